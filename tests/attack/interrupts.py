"""Attack: Ctrl-C at random moments of a run, from the command's first line to its end.

`python -m tests.attack.interrupts [--count N] [--seed N] [--jobs N]` starts small runs on the digits and sends each
one SIGINT. A run must end with status 130 (or 0, if it was already over), without a traceback or a crash, and leave no
temporary file. Some of the runs that saved their state are started again and must end with exactly the weights of an
uninterrupted run.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.runs import Runs, environment, weights
from tests.helpers.xla_flags import QUICK_TO_COMPILE, xla_flags

from .report import Attack, attempts, finish

COUNT, RESUMED = 200, 10
OPTIONS: dict = dict(epochs=2, warmup_epochs=0.5, evaluate_every=1, checkpoint_every=7, log_every=5)
SECONDS_TO_STOP = 120
"""Generous, for a busy machine; a run with nothing to save stops in less than a second."""
BAD_WORDS = ("Traceback", "Segmentation", "Fatal", "core dumped", "Exception ignored", "terminate called")


@dataclasses.dataclass
class Interrupted:
    """One run and how it ended.

    Attributes:
      phase: the last phase that its output mentioned.
      fault: what is wrong with how it ended; empty if nothing is.
      seconds: from the signal to the end.
      saved: whether it reports that its state is saved.
    """

    workdir: Path
    after: float
    phase: str
    fault: str
    seconds: float
    saved: bool


def start(runs: Runs, workdir: Path) -> subprocess.Popen:
    """Start a run in its own process group."""
    return subprocess.Popen(
        runs.command(workdir, **OPTIONS),
        env=environment() | {"XLA_FLAGS": f"{xla_flags(1)} {QUICK_TO_COMPILE}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_first_line(process: subprocess.Popen, workdir: Path) -> None:
    """Wait until the command watches for signals, which takes a second thread; before, Python itself is starting."""
    del workdir
    tasks = Path(f"/proc/{process.pid}/task")
    while process.poll() is None and tasks.is_dir() and len(list(tasks.iterdir())) < 2:
        time.sleep(0.0005)


def wait_for_training(process: subprocess.Popen, workdir: Path) -> None:
    """Wait until there is something to save and resume, however long that takes on this machine."""
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.005)


Wait = Callable[[subprocess.Popen, Path], None]


def interrupt(runs: Runs, workdir: Path, wait: Wait, after: float) -> Interrupted:
    """Send one SIGINT `after` seconds after `wait` returns, and examine how the run ends."""
    process = start(runs, workdir)
    wait(process, workdir)
    time.sleep(after)
    over = process.poll() is not None
    os.killpg(process.pid, signal.SIGINT) if not over else None
    sent = time.monotonic()
    try:
        out, err = process.communicate(timeout=SECONDS_TO_STOP)
        fault = ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        fault = f"still running after {SECONDS_TO_STOP} s"
    seconds = time.monotonic() - sent
    finished = '"test_top1_deploy_form"' in out
    expected = (0, 130) if finished else (130,)
    if process.returncode not in expected:
        fault = fault or f"status {process.returncode}"
    for word in BAD_WORDS:
        if word in err or word in out:
            fault = fault or f"{word} in {err[-500:]!r}"
    hidden = [str(path) for path in workdir.rglob(".*-????????*")]  # named by `atomic_path` and `scratch_folder`
    if hidden:
        fault = fault or f"temporary files left: {hidden}"
    saved = "state saved" in out
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    if saved and not any(f"stopped after step {step}," in out for step in steps):
        fault = fault or f"no checkpoint of {out.splitlines()[-1]!r}, but of {steps}"
    return Interrupted(workdir, after, phase_of(out, over, finished), fault, seconds, saved)


def phase_of(out: str, over: bool, finished: bool) -> str:
    """Return what a run was doing, judged by the lines it had printed."""
    if over:
        return "over"
    if finished:
        return "interpreter's end"
    if "epoch 2: " in out or "weights: " in out:
        return "last evaluations, weights, curves"
    if "state saved" in out:
        return "training, evaluation, checkpoints"
    return "compilation" if "steps;" in out or "resuming" in out else "start"


def resumes(runs: Runs, workdir: Path, whole: Path) -> str:
    """Start a run again; return what is wrong, or "" if it ends with exactly the weights of `whole`."""
    process = start(runs, workdir)
    out, err = process.communicate(timeout=600)
    if process.returncode:
        return f"started again, it ends with {process.returncode}: {out[-300:]!r} {err[-300:]!r}"
    same = all(weights(workdir, name) == weights(whole, name) for name in ("final", "deploy"))
    return "" if same else "started again, it ends in other weights"


def main() -> int:
    """Interrupt runs, and print one row for the interrupts and one for the resumed runs."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.interrupts")
    parser.add_argument("--count", type=int, default=attempts(COUNT))
    parser.add_argument(
        "--resumed", type=int, default=None, help="how many runs to start again (default: a tenth of --count)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    once, again = Attack("Ctrl-C at a random moment of a run"), Attack("… and the same command again, to the same bits")
    phases: collections.Counter[str] = collections.Counter()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs, root = Runs(Path(folder)), Path(folder)
        for name in ("first", "whole"):  # the first run writes the data set and compiles the C++
            begin = time.monotonic()
            assert not (fault := resumes_alone(runs, root / name)), fault
            seconds = time.monotonic() - begin
        to_resume = options.count // 10 if options.resumed is None else options.resumed
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            # One moment in each slice of a run's time, so that a few attempts reach every phase.
            moments: list[tuple[Wait, float]] = [
                (wait_for_first_line, seconds * (part + chance.random()) / options.count)
                for part in range(options.count)
            ]
            moments += [(wait_for_training, chance.random()) for _ in range(to_resume)]
            done = pool.map(lambda item: interrupt(runs, root / f"{item[0]}", *item[1]), enumerate(moments))
            for end in done:
                phases[end.phase] += 1
                print(f"{phases.total()}: {end.phase}, ended in {end.seconds:.1f} s", file=sys.stderr, flush=True)
                once.count(not end.fault, f"{end.phase}, after {end.after:.3f} s of {seconds:.0f}: {end.fault}")
                if end.saved and len(again.failures) + again.survived < to_resume:
                    fault = resumes(runs, end.workdir, root / "whole")
                    again.count(not fault, fault)
    once.note = ", ".join(f"{count} in {phase}" for phase, count in phases.most_common())
    return finish(once, again)


def resumes_alone(runs: Runs, workdir: Path) -> str:
    """Start a run and leave it alone; return what is wrong with how it ends, or "" if nothing is."""
    process = start(runs, workdir)
    out, err = process.communicate(timeout=600)
    return "" if process.returncode == 0 else f"status {process.returncode}: {out[-300:]!r} {err[-300:]!r}"


if __name__ == "__main__":
    raise SystemExit(main())
