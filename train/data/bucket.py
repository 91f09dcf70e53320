"""TFDS data sets in a bucket, read from a local copy, because their record files need random access."""

import hashlib
import itertools
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repvgg_jax.errors import DataError
from repvgg_jax.files import scratch_folder
from repvgg_jax.machine import cache_folder
from repvgg_jax.paths import Place
from repvgg_jax.storage import BucketPath

THREADS = 16


def on_this_machine(data_dir: Place, name: str, *, or_empty: bool = False) -> Path:
    """Return a local folder with the content of `data_dir` for the data set called `name`.

    A local folder is returned unchanged. From a bucket, files are copied to `~/.cache/repvgg_jax/data` (under
    `$XDG_CACHE_HOME` if that is set), except those that are already there with the same size.

    Args:
      data_dir: folder or bucket of the TFDS data sets.
      name: `NAME`, or `NAME/CONFIG:VERSION`, of which only the first part counts.
      or_empty: return the copy's folder even if the bucket holds no such data set.

    Raises:
      DataError: the bucket holds no such data set or cannot be read, or the disk is too small.
    """
    if not isinstance(data_dir, BucketPath):
        return data_dir
    source = data_dir / name.split(":")[0].split("/")[0]
    try:
        copy = cache_folder("data") / hashlib.sha256(str(data_dir).encode()).hexdigest()[:16]
        files = source.files()
        if not files and not or_empty:
            raise DataError(f"--data-dir {data_dir} holds no data set called {source.name}")
        targets = {file: copy / file.key.removeprefix(data_dir.key).lstrip("/") for file in files}
        missing = {file: target for file, target in targets.items() if not _has_size(target, files[file])}
        if missing:
            copy.mkdir(parents=True, exist_ok=True)
            _copy(missing, sum(files[file] for file in missing), source, copy)
    except OSError as error:
        raise DataError(f"cannot copy {source} to this machine: {error.strerror or error}") from error
    return copy


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy(files: dict[BucketPath, Path], size: int, source: BucketPath, copy: Path) -> None:
    """Download files, each of which appears complete, because another process may do the same."""
    gigabytes, free = size / 1e9, shutil.disk_usage(copy).free
    if size > free:
        raise DataError(
            f"{source} takes {gigabytes:.1f} GB and {copy} has {free / 1e9:.1f} GB left: set XDG_CACHE_HOME to a "
            "larger disk, or mount the bucket and give the mounted folder"
        )
    print(f"copying {len(files)} files, {gigabytes:.3g} GB, from {source} to {copy}", file=sys.stderr)
    with scratch_folder(".copying-", copy) as scratch, ThreadPoolExecutor(THREADS) as threads:

        def download(number: int, file: BucketPath, target: Path) -> None:
            part = scratch / str(number)
            file.download(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)

        list(threads.map(download, itertools.count(), files, files.values()))
