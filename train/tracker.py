"""Weights & Biases beside a run's own files (`--tracker wandb`), for as long as it works."""

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
"""In the run's folder: the id under which a resumption goes on."""
FINISH_SECONDS = 30
"""So long, at most, a run's end waits for uploads: clusters give little more between SIGTERM and SIGKILL."""


class Tracker:
    """Hands rows to Weights & Biases. Whatever fails there is one warning, and the run goes on without it.

    Args:
      workdir: folder of the run.
      start_step: where the run starts, under a new id, or resumes.
      note: hears where the run is to be seen, and the warning.
    """

    def __init__(self, workdir: Place, start_step: int, note: Callable[[str], object]):
        self._note, self._run = note, None
        with self._attempt():
            self._run = _start(workdir, start_step)
            if self._run.url:  # none offline
                note(f"Weights & Biases: {self._run.url}")

    def write(self, row: Row, prefix: str) -> None:
        """Hand over a row's numbers as `PREFIX/NAME`, TensorBoard's names."""
        with self._attempt():
            # A resumption takes some steps again; of those that it has already, W&B takes no second row.
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
        except Exception as error:  # of whatever kind: a run is worth more than its tracker
            self._run = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._note(f"warning: Weights & Biases gets no more of this run: {reason}")
            with contextlib.suppress(Exception):  # its hook at the interpreter's end would fail once more, aloud
                importlib.import_module("wandb").teardown()


def check_installed() -> None:
    """Import the package, before the data are opened.

    Raises:
      ConfigError: it is not installed.
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
