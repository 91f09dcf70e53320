"""`python -m tests.attack.training_memory`: resident memory of a training run over 2,000 steps.

A real process trains a tiny net on the digits, with moving averages, logs, checkpoints and evaluations. A leak grows
with the steps; what a run allocates once (compiled code, pools that fill up) does not. So the growth over the second
half of the run is what counts.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.runs import Runs, rows

from .report import Attack, attempts, finish

LIMIT_KB = 10
"""Growth per step, in KB, that counts as a leak: a step's state that is never freed would be more."""
STEPS_IN_EPOCH = 11


def resident_kb(process: int) -> int | None:
    """Return a process's resident memory; None if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = re.search(r"VmRSS:\s+(\d+)", status)
    return None if match is None else int(match[1])


def measure(workdir: Path, process: subprocess.Popen) -> list[tuple[int, int]]:
    """Return, until the process ends, pairs of a step and the memory in use then."""
    points = []
    while process.poll() is None:
        time.sleep(0.5)
        resident = resident_kb(process.pid)
        if resident is not None and (workdir / "metrics.jsonl").exists() and rows(workdir):
            points.append((rows(workdir)[-1]["step"], resident))
    return points


def median_around(points: list[tuple[int, int]], first: float, end: float) -> float:
    """Return the median memory between two steps."""
    return statistics.median(memory for step, memory in points if first <= step < end)


def main() -> int:
    """Train, and judge the growth."""
    steps = max(400, attempts(2000))  # a shorter run ends before there is anything to compare
    attack = Attack(f"training steps: resident memory grows by less than {LIMIT_KB} KB each")
    with tempfile.TemporaryDirectory() as folder:
        runs, workdir = Runs(Path(folder) / "shared"), Path(folder) / "run"
        epochs = -(-steps // STEPS_IN_EPOCH)
        process = runs.start(workdir, epochs=epochs, checkpoint_every=200, evaluate_every=20, ema_decay=0.99)
        points = measure(workdir, process)
        _, err = process.communicate()
        last = rows(workdir)[-1]["step"]
        if process.returncode != 0 or last < steps:
            attack.count(False, f"ended at step {last} with {process.returncode}: {err}")
            return finish(attack)
    middle = median_around(points, last * 0.45, last * 0.55)
    end = median_around(points, last * 0.9, last + 1)
    grown = (end - middle) / (last * 0.45)
    attack.note = f"{middle / 1024:.0f} MiB in the middle, {end / 1024:.0f} MiB at the end: {grown:+.2f} KB in a step"
    if grown < LIMIT_KB:
        attack.survived = last
    else:
        attack.count(False, attack.note)
    return finish(attack)


if __name__ == "__main__":
    sys.exit(main())
