"""Attacks: what a user's machine, files and signals can do to this software, done on purpose and counted.

`make attack` (or `python -m tests.attack`) runs every module of this package and prints one table;
`python -m tests.attack.NAME` runs one. `docs/reliability.md` holds the results. To add an attack, add a module that
counts with `report.Attack` and ends in `report.finish`: every module here is run, except those whose names begin with
an underscore.

`ATTACK_SCALE=0.01` makes a hundredth of all attempts, which shows only that an attack runs.
"""
