"""Alternating measurements: each contestant lives in a process of its own and runs when told to, one at a time.

A contestant is a worker process that prints `ready` once it has compiled and warmed up, then answers each line on its
stdin with one JSON object a run, and on `end` with its peak memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Numbers = dict[str, float]


class ContestantDiedError(RuntimeError):
    """A worker process ended before it was told to."""


class Contestant:
    """A worker process: `python -m MODULE --worker NAME …`, started here.

    Args:
      name: what it runs.
      module: the benchmark that it is a worker of.
      arguments: passed on.
      environment: its own, if not this process's.
      ready: wait until it is; else call `expect_ready` later.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str] | None = None,
        *,
        ready: bool = True,
    ):
        self.name = name
        self.runs: list[Numbers] = []
        self.summary: Numbers = {}
        command = [sys.executable, "-m", module, "--worker", name, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if ready:
            self.expect_ready()

    def expect_ready(self) -> None:
        """Wait until it has compiled and warmed up."""
        while self._line() != "ready":  # libraries print what they like before that
            pass

    def run(self) -> None:
        """One measured run."""
        self.runs.append(self._ask("run"))

    def end(self) -> None:
        """Ask for the peak memory, and leave."""
        self.summary = self._ask("end")
        self._process.wait()

    def kill(self) -> None:
        """End it without asking."""
        self._process.kill()
        self._process.wait()

    def _ask(self, word: str) -> Numbers:
        assert self._process.stdin is not None
        try:
            print(word, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise ContestantDiedError(f"{self.name} has died") from None
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContestantDiedError(f"{self.name} has died (exit status {self._process.wait()})")
        return line.strip()


def alternate(contestants: Sequence[Contestant], rounds: int) -> None:
    """Let each run once a round, in turn, then end them all."""
    for _ in range(rounds):
        for contestant in contestants:
            contestant.run()
    for contestant in contestants:
        contestant.end()


def serve(run: Callable[[], Numbers], summary: Callable[[], Numbers]) -> None:
    """A worker's side: `run` is compiled and warm."""
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps(summary()), flush=True)
            return
        print(json.dumps(run()), flush=True)


def resident_bytes(field: str) -> int:
    """This process's resident set now (`VmRSS`) or at its peak (`VmHWM`), as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far; its parent's, which `getrusage` counts too, left out."""
    return resident_bytes("VmHWM")


def versions(*modules: Any) -> str:
    """`jax 0.10.2, torch 2.13.0`."""
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
