"""Weight files and training runs in buckets, read from a local copy."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import WeightsError, system_errors
from ..files import scratch_folder
from ..storage import BucketPath
from .side_file import side_path
from .training_run import find_checkpoint


@dataclasses.dataclass(frozen=True)
class Copy:
    """A local copy of a weight file or a checkpoint.

    Attributes:
      path: the copy.
      original: the file or checkpoint in the bucket.
      note: remark on the choice of the checkpoint to show the user, if any.
    """

    path: Path
    original: BucketPath
    note: str | None

    def naming_original(self, text: str) -> str:
        """Return a message about the copy with the original's path in place of the copy's."""
        return text.replace(f"{self.path.parent}", f"{self.original.parent}")


@contextlib.contextmanager
def copied(address: str) -> Iterator[Copy]:
    """Yield a local copy of a weight file, with its side file if any, or of a run's checkpoint.

    A WeightsError raised inside the block names the original instead of the copy.

    Raises:
      ConfigError: as `BucketPath.parse`.
      WeightsError: there is nothing at `address`, it holds no checkpoint, or it cannot be fetched.
    """
    source, note = BucketPath.parse(address), None
    with scratch_folder("repvgg-", tempfile.gettempdir()) as folder:
        with system_errors(WeightsError, f"cannot read {source}"):
            if source.is_dir():
                source, note = find_checkpoint(source)
            elif not source.exists():
                raise WeightsError(f"{source} does not exist")
            copy = Copy(folder / source.name, source, note)
            source.download(copy.path)
            side = BucketPath.parse(f"{source}.json")
            if copy.path.is_file() and side.is_file():
                side.download(Path(side_path(copy.path)))
        try:
            yield copy
        except WeightsError as error:
            raise WeightsError(copy.naming_original(f"{error}")) from error
