"""Attacks: what a user's machine, files and signals may do to this software, done on purpose and counted.

`make attack` (or `python -m tests.attack`) runs every module of this package and prints one table;
`python -m tests.attack.NAME` runs one. `docs/reliability.md` keeps the results. To add an attack, add a module: it
counts with `report.Attack`, ends in `report.finish`, and is found by its being here. Modules whose names begin with an
underscore are not run.

`ATTACK_SCALE=0.01` tries a hundredth of everything: to see that an attack runs at all.
"""
