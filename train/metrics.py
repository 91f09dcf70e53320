"""A run's metrics: written to metrics.jsonl and TensorBoard events, and read back for plots."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # generated
from tensorboardX.summary import scalar

from repvgg_jax.errors import RepVGGError
from repvgg_jax.files import atomic_path
from repvgg_jax.paths import Place

Row = dict[str, Any]


def read_rows(path: Place, note: Callable[[str], object] | None = None) -> list[Row]:
    """Return the rows of a metrics.jsonl; a last line that a crash cut short is skipped, with a message to `note`.

    Raises:
      RepVGGError: the file cannot be read, or a line before the last is not a JSON object with a step.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RepVGGError(f"cannot read {path}: {error.strerror or error}") from error
    rows, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it is not an object with a step")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):
                if note is not None:
                    note(f"{path}: the last line was cut short and is skipped")
                break
            raise RepVGGError(f"{path}, line {number} is damaged ({error}); fix or remove that line") from error
    return rows


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl` and scalars to TensorBoard events in `workdir`.

    Args:
      workdir: folder of the run.
      start_step: step at which the run starts or resumes; rows of later steps, left by a run that was killed after its
        last checkpoint, are dropped, because those steps are repeated.
      finished: whether all steps are done; the final evaluation, which is repeated, is then dropped too.
      note: receives a message about a last line that was cut short.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        *,
        finished: bool = False,
        note: Callable[[str], object] | None = None,
    ):
        path = workdir / "metrics.jsonl"
        rows = [row for row in read_rows(path, note) if row["step"] <= start_step]
        if finished:
            rows = [row for row in rows if row["step"] < start_step or "form" not in row]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._workdir = workdir
        with self._written():
            # Both are written in this thread and without buffering, so a full disk raises an error here.
            self._file = path.open("ab", buffering=0)
            self._events = EventsWriter(str(workdir / "events"))
            if start_step:  # makes TensorBoard discard earlier events of the steps from here on
                self._add_event(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
                self._events.flush()

    def write(self, row: Row, prefix: str) -> None:
        """Append one row; TensorBoard shows its numbers as `PREFIX/NAME`.

        Raises:
          RepVGGError: the disk is full, or the folder can no longer be written to.
        """
        clean = {name: _rounded(value) for name, value in row.items()}
        with self._written():
            if not os.fstat(self._file.fileno()).st_nlink:  # the file was deleted: write the rest to a new one
                self._file.close()
                self._file = (self._workdir / "metrics.jsonl").open("ab", buffering=0)
            self._file.write((json.dumps(clean) + "\n").encode())
            for name, value in clean.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._add_event(Event(step=row["step"], summary=scalar(f"{prefix}/{name}", value)))
            self._events.flush()

    def flush(self) -> None:
        """Do nothing, as everything is already written."""

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        with suppress(OSError):  # a failed write has already been reported
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RepVGGError(f"cannot write the metrics to {self._workdir}: {error.strerror or error}") from error


class SilentLog:
    """A log that writes nothing, for all processes except the first."""

    def write(self, row: Row, prefix: str) -> None:
        """Discard a row."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _rounded(value: Any) -> Any:
    """Round a float to six significant digits; return any other value unchanged."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return value
    return round(value, 5 - math.floor(math.log10(abs(value))))
