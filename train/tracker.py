"""Weights & Biases in addition to a run's files (`--tracker wandb`); a failure there does not stop the run."""

import contextlib
import importlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from repvgg_jax.errors import ConfigError
from repvgg_jax.extras import missing_library
from repvgg_jax.files import atomic_path
from repvgg_jax.paths import Place

from .metrics import Row

ID = "wandb.json"
"""File in the run's folder with the W&B id under which a resumed run continues."""
FINISH_SECONDS = 30
"""Longest wait for uploads at a run's end; clusters allow little more between SIGTERM and SIGKILL."""


class Tracker:
    """Sends rows to Weights & Biases. Any failure there prints one warning, and the run continues without it.

    Args:
      workdir: folder of the run.
      start_step: step at which the run resumes; 0 starts a new W&B run.
      note: receives the address of the W&B run, and the warning.
    """

    def __init__(self, workdir: Place, start_step: int, note: Callable[[str], object]):
        self._note, self._run = note, None
        with self._attempt():
            self._run = _start(workdir, start_step)
            if self._run.url:  # none offline
                note(f"Weights & Biases: {self._run.url}")

    def write(self, row: Row, prefix: str) -> None:
        """Send a row's numbers as `PREFIX/NAME`, TensorBoard's names."""
        with self._attempt():
            # A resumed run repeats some steps; W&B accepts no second row for a step.
            if self._run is not None and row["step"] >= self._run.step:
                numbers = {f"{prefix}/{k}": v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
                self._run.log(numbers, step=row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._attempt():
            if self._run is not None:
                self._run.finish(exit_code=int(any(error)))

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: the tracker must not stop the run
            self._run = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._note(f"warning: Weights & Biases failed and gets no more of this run: {reason}")
            with contextlib.suppress(Exception):  # otherwise its exit hook would fail again and print it
                importlib.import_module("wandb").teardown()


def check_installed() -> None:
    """Import wandb, before the data are opened.

    Raises:
      ConfigError: wandb is not installed.
    """
    try:
        importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tracker wandb: {missing_library(error) or error}") from error


def _start(workdir: Place, start_step: int) -> Any:
    path = workdir / ID
    if not start_step or not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return importlib.import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", "repvgg-jax"),
        name=os.environ.get("WANDB_NAME", workdir.name),
        id=json.loads(path.read_text(encoding="utf-8"))["id"],
        config=json.loads((workdir / "config.json").read_text(encoding="utf-8")),
        dir=workdir if isinstance(workdir, Path) else None,
        resume="allow",
        settings=dict(console="off", silent=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
    )
