"""Check of a run for a machine that is not at hand: its train step is compiled for that machine.

This shows whether the run fits the machine's memory, the cost of a step, and an upper limit of its speed. Nothing is
run, no data are read and nothing is written.
"""

import json
import sys

from .fitting import Compiled, compile_step, find_largest, with_batch
from .parallel import per_device_batch
from .preflight_report import Report
from .recipe import Recipe
from .run import make_run, open_data
from .targets import compile_devices, find_target, prepare


def preflight(recipe: Recipe, name: str) -> int:
    """Compile the run for a target and print a report; the last line on stdout is one JSON object.

    Returns:
      The exit status: 0 if it fits, 1 if it does not.

    Raises:
      RepVGGError: there is no such target, its compiler is not installed, or the run's options are invalid.
    """
    target = find_target(name)
    usable = target.usable
    prepare(target)
    run = make_run(recipe, open_data(recipe, unopened=True))
    devices = compile_devices(target)
    per_device_batch(recipe.optimizer.batch_size, recipe.optimizer.accumulate, len(devices))

    def compiled(per_chip: int) -> Compiled:
        note = f"compiling for {len(devices)} x {devices[0].device_kind}, {per_chip} images each; this takes minutes"
        print(note, file=sys.stderr, flush=True)
        return compile_step(with_batch(run, per_chip * len(devices)), devices, target.family.platform)

    asked = compiled(recipe.optimizer.batch_size // len(devices))
    fits, largest = asked.fits(usable), None
    if recipe.run.preflight_largest or not fits:
        most = len(run.dataset.train) // len(devices)
        largest = find_largest(compiled, asked, usable, step=recipe.optimizer.accumulate, most=most)
    report = Report(target, len(devices), recipe, asked, largest)
    print("\n".join([*report.lines(), json.dumps(report.summary())]))
    return 0 if fits else 1
