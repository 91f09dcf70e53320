"""The folder of a run, local or in a bucket, to which one run at a time can write."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from repvgg_jax.errors import ConfigError, RepVGGError
from repvgg_jax.paths import Place
from repvgg_jax.storage import BucketPath

from . import cluster
from .bucket_claim import BucketClaim
from .config_file import save_or_compare
from .orbax_support import check_folder_name
from .recipe import Recipe

LOCK = ".lock"


@contextlib.contextmanager
def claimed(recipe: Recipe, workdir: Place) -> Iterator[Callable[[], None]]:
    """Create the run's folder with its config.json, and keep other runs out of it.

    Yields:
      A function that raises RepVGGError if another run has taken the folder over, as it may in a bucket.

    Raises:
      RepVGGError: the folder cannot be created or written to.
      ConfigError: another run uses it, it holds a run with other options, or orbax cannot use its name.
    """
    if isinstance(workdir, Path):
        check_folder_name("--workdir", workdir)
    with contextlib.ExitStack() as stack:
        check = _nothing
        if cluster.is_leader():
            try:
                if isinstance(workdir, BucketPath):
                    check = stack.enter_context(BucketClaim(workdir, LOCK)).check
                else:
                    workdir.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_locked(workdir))
            except OSError as error:
                raise RepVGGError(f"cannot create --workdir {workdir}: {error.strerror or error}") from error
            save_or_compare(recipe, workdir)
        cluster.barrier("workdir")
        yield check


def _nothing() -> None:
    """Do not check."""


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Hold an exclusive `flock`, which the kernel releases whenever and however the process ends."""
    with (workdir / LOCK).open("a+b") as file:
        if not _lock(file):
            raise ConfigError(
                f"--workdir {workdir} is in use by {_holder(file)}: wait for it, stop it, or choose another folder"
            )
        try:
            _write_holder(file, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            with contextlib.suppress(OSError):  # closing the file releases the lock itself
                _write_holder(file, None)


def _lock(file: BinaryIO) -> bool:
    """Try to take the lock; return whether this succeeded, or True if the system or file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def _write_holder(file: BinaryIO, holder: dict[str, object] | None) -> None:
    file.truncate(0)
    if holder is not None:
        file.write(json.dumps(holder).encode())
    file.flush()


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has locked the file but not yet written its name
        return "another process"
