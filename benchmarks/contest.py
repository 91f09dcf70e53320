"""Alternating measurements: each contestant is a separate process that runs on request, one at a time.

A contestant prints `ready` once it has compiled and warmed up. Then it answers each line on its stdin with one JSON
object per run, and `end` with its peak memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repvgg_jax.errors import RepVGGError

Numbers = dict[str, float]


class ContestantDiedError(RepVGGError):
    """A worker process ended before it was asked to."""


class Contestant:
    """A worker process, started as `python -m MODULE --worker NAME …`.

    Args:
      name: name of the contestant.
      module: module of the benchmark.
      arguments: further command-line arguments.
      environment: environment of the process; None for that of this process.
      ready: wait until the worker is ready; otherwise, call `expect_ready` later.
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
        """Wait until the worker has compiled and warmed up."""
        while self._line() != "ready":  # libraries may print other lines before
            pass

    def run(self) -> None:
        """Take one measurement."""
        self.runs.append(self._ask("run"))

    def end(self) -> None:
        """Ask for the peak memory, and wait for the process to end."""
        self.summary = self._ask("end")
        self._process.wait()

    def kill(self) -> None:
        """Kill the process."""
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
    """Let each contestant run once per round, in turn, then end them all."""
    for _ in range(rounds):
        for contestant in contestants:
            contestant.run()
    for contestant in contestants:
        contestant.end()


def serve(run: Callable[[], Numbers], summary: Callable[[], Numbers]) -> None:
    """Serve requests in a worker, once `run` is compiled and warmed up."""
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps(summary()), flush=True)
            return
        print(json.dumps(run()), flush=True)


def resident_bytes(field: str) -> int:
    """Return this process's current (`VmRSS`) or peak (`VmHWM`) resident set, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_resident_bytes() -> int:
    """Return the peak resident set of this process, without its parent's, which `getrusage` would include."""
    return resident_bytes("VmHWM")


def versions(*modules: Any) -> str:
    """Return the modules' versions, such as `jax 0.10.2, torch 2.13.0`."""
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
