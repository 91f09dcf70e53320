"""Runs of a tiny model on the digits, as real processes, for the tests of what a run survives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.helpers.repository import ROOT
from tests.helpers.xla_flags import xla_flags

TINY = ["--num-blocks", "1", "1", "2", "1", "--widths", "8", "8", "8", "16", "16"]
"""Architecture options of all these runs."""


def environment(devices: int = 1, cache: Path | None = None) -> dict[str, str]:
    """Return the environment for a process with `devices` virtual CPU devices and `cache` as its compilation cache."""
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if cache is not None:
        variables |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return variables


class Runs:
    """Starts runs that share a data set and a compilation cache."""

    def __init__(self, folder: Path):
        self.data, self.cache = folder / "data", folder / "cache"

    def command(self, workdir: Path, **options: Any) -> list[str]:
        """Return the whole command line."""
        return [sys.executable, "-m", "train.main", *self.words(workdir, **options)]

    def words(self, workdir: Path, **options: Any) -> list[str]:
        """Return the arguments after the command; option names use underscores, and True stands for a flag."""
        chosen = dict(epochs=2, warmup_epochs=0.5, evaluate_every=1, checkpoint_every=10, log_every=11) | options
        words = ["--preset", "digits", *TINY]
        words += ["--image-size", "16", "--test-image-size", "16", "--data-dir", str(self.data)]
        words += ["--workdir", str(workdir)]
        for name, value in chosen.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return words

    def start(
        self, workdir: Path, devices: int = 1, largest_file: int | None = None, **options: Any
    ) -> subprocess.Popen:
        """Start a run in the background; writing fails after `largest_file` bytes, as on a full disk."""
        limit = [] if largest_file is None else ["prlimit", f"--fsize={largest_file}"]
        return subprocess.Popen(
            limit + self.command(workdir, **options),
            env=environment(devices, self.cache),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, workdir: Path, devices: int = 1, **options: Any) -> subprocess.CompletedProcess:
        """Run to the end, whatever the outcome."""
        process = self.start(workdir, devices, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def worker_processes(process: subprocess.Popen) -> list[int]:
    """Return the ids of a run's worker processes."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    numbers = [int(number) for path in children for number in path.read_text(encoding="utf-8").split()]
    return [number for number in numbers if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()]


def is_alive(number: int) -> bool:
    """Return whether a process with this id exists and has not ended."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def weights(workdir: Path, name: str = "final") -> dict[str, bytes]:
    """Return a weight file's tensors as bytes, for bit-for-bit comparison."""
    return {key: array.tobytes() for key, array in load_file(workdir / f"{name}.safetensors").items()}


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in rows]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    """Runs that all tests of one process share."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def uninterrupted(runs: Runs, tmp_path_factory) -> Path:
    """The workdir of an undisturbed run with moving averages."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 0, done.stderr
    return workdir
