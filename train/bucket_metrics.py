"""A run's metrics in a bucket, where objects cannot be appended to: local files, copied whole at intervals."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from repvgg_jax.errors import RepVGGError
from repvgg_jax.files import scratch_folder
from repvgg_jax.storage import BucketPath

from .metrics import MetricsLog, Row

UPLOAD_SECONDS = 30
"""A training row that is written this long after the last copy triggers the next one."""


class BucketMetricsLog:
    """A `MetricsLog` whose files are copied into a bucket: every `UPLOAD_SECONDS`, and at every evaluation.

    The arguments are those of `MetricsLog`.
    """

    def __init__(
        self,
        workdir: BucketPath,
        start_step: int,
        *,
        finished: bool = False,
        note: Callable[[str], object] | None = None,
    ):
        self._workdir = workdir
        with ExitStack() as stack:
            self._folder = stack.enter_context(scratch_folder("repvgg-metrics-", tempfile.gettempdir()))
            rows = workdir / "metrics.jsonl"
            try:
                if rows.is_file():
                    rows.download(self._folder / rows.name)
            except OSError as error:
                raise RepVGGError(f"cannot read {rows}: {error.strerror or error}") from error
            self._log = MetricsLog(self._folder, start_step, finished=finished, note=note)
            self._cleanup = stack.pop_all()
        self._is_open = True
        self._sizes: dict[str, int] = {}
        self.flush()

    def write(self, row: Row, prefix: str) -> None:
        """Write a row as `MetricsLog.write` does.

        Raises:
          RepVGGError: the bucket cannot be written to.
        """
        self._log.write(row, prefix)
        if "form" in row or time.monotonic() - self._copied > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Copy everything written so far.

        Raises:
          RepVGGError: the bucket cannot be written to.
        """
        try:
            for path in sorted(self._folder.iterdir()):
                size = path.stat().st_size
                if self._sizes.get(path.name) != size:
                    (self._workdir / path.name).upload(path)
                    self._sizes[path.name] = size
        except OSError as error:
            raise RepVGGError(f"cannot write the metrics to {self._workdir}: {error.strerror or error}") from error
        self._copied = time.monotonic()

    def close(self) -> None:
        """Copy the rest and remove the local files.

        Raises:
          RepVGGError: the bucket cannot be written to.
        """
        if self._is_open:
            self._is_open = False
            with self._cleanup:
                self._log.close()
                self.flush()

    def __enter__(self) -> "BucketMetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RepVGGError:
            if error is None:  # the user should read the first error
                raise
