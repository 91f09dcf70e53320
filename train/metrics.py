"""Where a run's numbers go: metrics.jsonl, TensorBoard, and back again for plots."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from repvgg_jax.errors import RepVGGError
from repvgg_jax.files import atomic_path

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
      RepVGGError: a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("no row with a step")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):
                break
            raise RepVGGError(f"{path}, line {number} is damaged ({error}); remove it to go on") from error
    return rows


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl` and scalars to TensorBoard events in `workdir`.

    Args:
      workdir: folder of the run.
      start_step: where the run starts or resumes; rows of later steps, left by a run that was killed after its
        last checkpoint, are dropped, since those steps are taken again.
      finished: all steps are taken already; the final evaluation, which is made again, is dropped too.
    """

    def __init__(self, workdir: Path, start_step: int, *, finished: bool = False):
        path = workdir / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= start_step]
        if finished:
            rows = [row for row in rows if row["step"] < start_step or "form" not in row]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file: TextIO | None = path.open("a", buffering=1)
        self._events: SummaryWriter | None = SummaryWriter(
            str(workdir), purge_step=start_step + 1 if start_step else None
        )

    @classmethod
    def silent(cls) -> "MetricsLog":
        """A log that writes nothing: of several processes, all but the first have this one."""
        log = cls.__new__(cls)
        log._file = log._events = None
        return log

    def write(self, row: Row, prefix: str) -> None:
        """Append one row; TensorBoard shows its numbers as `PREFIX/NAME`."""
        if self._file is None or self._events is None:
            return
        clean = {name: _rounded(value) for name, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        for name, value in clean.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                self._events.add_scalar(f"{prefix}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush and close both."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()


def _rounded(value: Any) -> Any:
    """Six significant digits: enough to plot and compare, short enough to read."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return value
    return round(value, 5 - math.floor(math.log10(abs(value))))
