"""Atomic writing of files and folders: readers never see an incomplete one."""

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import RepVGGError, system_errors
from .interrupts import on_exit, signals_wait
from .paths import exists, expand_home, place
from .storage import BucketPath


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`, renamed to it when the block succeeds and removed when it fails.

    The temporary file has the same name, inside a hidden folder, since some writers choose the format by the suffix.
    For a path in a bucket, it is on this machine and is uploaded as one object when the block succeeds.

    Args:
      path: the file to write.
      mode: its permissions. If None, those of the file that is replaced, or those that `open` would set.

    Raises:
      RepVGGError: the folder does not exist or cannot be written to, or the disk is full.
    """
    target = place(path)
    check_target(target)
    if isinstance(target, BucketPath):
        with _uploaded(target) as temporary:
            yield temporary
        return
    try:
        with scratch_folder(hidden_prefix(target), target.parent) as folder:
            temporary = folder / target.name
            yield temporary
            if mode is None:  # some writers create files that only their owner can read
                mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
            temporary.chmod(mode)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
    except OSError as error:
        raise RepVGGError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def _uploaded(target: BucketPath) -> Iterator[Path]:
    try:
        with scratch_folder("repvgg-", tempfile.gettempdir()) as folder:
            temporary = folder / f"object{target.suffix}"
            yield temporary
            target.upload(temporary)
    except OSError as error:
        raise RepVGGError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def uploaded_folder(target: BucketPath) -> Iterator[Path]:
    """Yield a local folder, whose files are uploaded to `target` one by one when the block succeeds.

    Raises:
      RepVGGError: a file cannot be uploaded.
    """
    try:
        with scratch_folder("repvgg-", tempfile.gettempdir()) as folder:
            yield folder
            target.upload_folder(folder)
    except OSError as error:
        raise RepVGGError(f"cannot write to {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, renamed to it when the block succeeds and removed when it fails.

    Raises:
      RepVGGError: `path` exists or cannot be created, or is in a bucket, which has no folders.
    """
    check_new_folder(path)
    target = Path(expand_home(path))
    try:
        with scratch_folder(hidden_prefix(target), target.parent) as temporary:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            with signals_wait():  # a signal's cleanup must not delete the folder under its new name
                temporary.rename(target)
    except OSError as error:
        raise RepVGGError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder in `parent`. It is removed after the block, even if a signal ends the process.

    After a signal the block may still be running; opening files in the removed folder then fails.
    """
    folder = Path(parent, f"{prefix}{secrets.token_hex(4)}")
    with on_exit(functools.partial(_remove, folder)):
        with signals_wait():
            folder.mkdir(0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def hidden_prefix(target: Path) -> str:
    """Return the prefix for a temporary folder next to `target`, shortened so that the whole name is not too long."""
    return f".{target.stem[:50]}-"


def check_new_folder(path: str | os.PathLike) -> None:
    """Check in advance, as far as possible, that `atomic_folder` can write `path`.

    Raises:
      RepVGGError: `path` exists, its parent does not exist or cannot be written to, or it is in a bucket.
    """
    if isinstance(place(path), BucketPath):
        raise RepVGGError(
            f"cannot write {path}: a folder cannot be written atomically to a bucket; write it locally and copy it"
        )
    if exists(path):
        raise RepVGGError(f"cannot write {path}: it exists already")
    check_target(path)


def check_target(path: str | os.PathLike) -> None:
    """Check in advance, as far as possible, that `atomic_path` can write `path`. Call it before a long computation.

    Raises:
      RepVGGError: `path` is a folder or an invalid name, or its folder does not exist or cannot be written to.
    """
    target = place(path)
    if isinstance(target, BucketPath):
        _check_object(target)
        return
    with system_errors(RepVGGError, f"cannot write {target}", ValueError), contextlib.suppress(FileNotFoundError):
        os.lstat(target)  # fails for a name that is too long or contains a NUL
    if target.is_dir():
        raise RepVGGError(f"cannot write {target}: it is a folder")
    if not target.parent.is_dir():
        raise RepVGGError(f"cannot write {target}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RepVGGError(f"cannot write {target}: no permission to write to {target.parent}")


def _check_object(target: BucketPath) -> None:
    """Raise RepVGGError if `target` is a bucket or folder, or cannot be looked up; does not check write permission."""
    with system_errors(RepVGGError, f"cannot write {target}"):
        is_folder = not target.key or target.is_dir()
    if is_folder:
        raise RepVGGError(f"cannot write {target}: it is a folder")


def _remove(folder: Path) -> None:
    """Rename and then remove a folder, since another thread may still be creating files under its old name."""
    with contextlib.suppress(OSError):
        folder = folder.rename(folder.with_name(f"{folder.name}-removed"))
    shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)  # can only be read by setting it
    os.umask(umask)
    return umask
