"""`python -m tests.attack.training_faults`: kill, stop and freeze training runs, and check how they end.

Real processes train a tiny net on the digits. Whatever happened to a run, the same command must then continue and end
with exactly the weights of an undisturbed run. A checkpoint is written after every second or fifth step.
"""

import functools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.runs import Runs
from tests.train.test_processes import start_two
from tests.train.test_resume import same_result, steps_in, wait_for, writing_or_over
from train.cluster import HEARTBEAT_SECONDS

from .report import Attack, attempts, finish

OPTIONS: dict[str, Any] = dict(epochs=4, checkpoint_every=2, evaluate_every=2, ema_decay=0.99)
LONGER = dict(OPTIONS, epochs=max(6, attempts(30)), checkpoint_every=5, evaluate_every=10)
SECONDS = 3600
"""A run that takes longer counts as hung."""


def finished(*processes: subprocess.Popen) -> None:
    """Wait until all have exited with status 0."""
    try:
        for process in processes:
            _, err = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, f"exit status {process.returncode}: {err}"
    finally:
        for process in processes:
            process.kill()


def until_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Wait for a checkpoint of `step` or a later one."""
    wait_for(lambda: process.poll() is not None or max(steps_in(workdir), default=-1) >= step, seconds=SECONDS)
    assert process.poll() is None, process.communicate()


def kills(runs: Runs, folder: Path) -> Attack:
    """Kill one run many times with SIGKILL, every second time while a checkpoint is being written."""
    times, chance = attempts(20), random.Random(0)
    attack = Attack("SIGKILL of a training run, started again each time; the end bit for bit")
    expected, workdir = folder / "whole", folder / "killed"
    finished(runs.start(expected, **LONGER))
    left = 0
    for number in range(times):
        with attack.attempt(f"kill {number}"):
            before = max(steps_in(workdir), default=0)
            process = runs.start(workdir, **LONGER)
            try:
                until_step(workdir, before + 1, process)  # so it has resumed and made progress
                if number % 2:
                    wait_for(functools.partial(writing_or_over, workdir, process), poll=0.0005)
                time.sleep(chance.uniform(0, 0.003 if number % 2 else 0.3))
                assert process.poll() is None, "the run was over before it was killed"
            finally:
                process.kill()
                process.communicate()
            left += any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    attack.note = f"{left} kills left a half-written checkpoint"
    with attack.attempt("the end"):
        finished(runs.start(workdir, **LONGER))
        same_result(workdir, expected)
    return attack


def two_sigterms(runs: Runs, folder: Path) -> Attack:
    """Send SIGTERM, and again while the run is stopping."""
    attack = Attack("SIGTERM twice, up to half a second apart; the end bit for bit")
    expected = folder / "whole_for_sigterm"
    finished(runs.start(expected, **OPTIONS))
    for number in range(attempts(5)):
        with attack.attempt(number):
            workdir = folder / f"terminated{number}"
            process = runs.start(workdir, **OPTIONS)
            until_step(workdir, 4, process)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1 * number)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=120)
            assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), (process.returncode, err)
            assert "Traceback" not in err, err
            assert steps_in(workdir), "no checkpoint is left"
            finished(runs.start(workdir, **OPTIONS))
            same_result(workdir, expected)
    return attack


def frozen(runs: Runs, folder: Path) -> Attack:
    """Stop one of two processes with SIGSTOP for longer than the heartbeat, then continue it with SIGCONT."""
    attack = Attack(
        f"SIGSTOP of one of two processes for {HEARTBEAT_SECONDS + 30} s: both end, then resume, bit for bit"
    )
    expected = folder / "two"
    finished(*start_two(runs, expected, **LONGER))
    for number in range(attempts(2)):
        with attack.attempt(f"process {number % 2} is stopped"):
            workdir = folder / f"frozen{number}"
            processes = start_two(runs, workdir, **LONGER)
            try:
                until_step(workdir, 4, processes[0])
                victim, other = processes[number % 2], processes[1 - number % 2]
                victim.send_signal(signal.SIGSTOP)
                stopped = time.monotonic()
                other.communicate(timeout=HEARTBEAT_SECONDS + 120)
                assert other.returncode not in (0, None), "the other process exits with status 0"
                time.sleep(max(0, stopped + HEARTBEAT_SECONDS + 30 - time.monotonic()))
                victim.send_signal(signal.SIGCONT)
                victim.communicate(timeout=HEARTBEAT_SECONDS + 120)
                assert victim.returncode != 0, "the process that was stopped exits with status 0"
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
            finished(*start_two(runs, workdir, **LONGER))
            same_result(workdir, expected)
    return attack


def main() -> int:
    """Run all three attacks."""
    folder = Path(tempfile.mkdtemp())
    try:
        runs = Runs(folder / "shared")
        return max(finish(attack(runs, folder)) for attack in (kills, two_sigterms, frozen))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
