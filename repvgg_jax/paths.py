"""Paths as users type them, and the one place where they become something to read and write (`place`)."""

import errno
import os
import re
from pathlib import Path

from .errors import ConfigError
from .storage import LIBRARIES, BucketPath

Place = Path | BucketPath
"""A file or folder: of this machine, or in a bucket."""


def is_url(text: str) -> bool:
    """Return whether `text` is a URL (`gs://…`, `s3://…`) and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def in_bucket(path: str | os.PathLike) -> bool:
    """Return whether `path` names something in a bucket."""
    return os.fspath(path).lower().startswith(tuple(f"{scheme}://" for scheme in LIBRARIES))


def expand_home(path: str | os.PathLike) -> str:
    """Return `path` with `~` expanded, or as it is where no user has that name. A final slash stays."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 (Path's own raises and drops the slash)


def place(path: str | os.PathLike) -> Place:
    """Return what `path` names: something in a bucket, or a path of this machine with `~` expanded.

    Raises:
      ConfigError: as `BucketPath.parse`, for a URL.
    """
    if isinstance(path, BucketPath):
        return path
    return BucketPath.parse(os.fspath(path)) if is_url(os.fspath(path)) else Path(expand_home(path))


def option_place(name: str, text: str) -> Place:
    """Return what an option's `text` names: something in a bucket, or as `local_path`.

    Raises:
      ConfigError: as `local_path`, but for buckets, and as `BucketPath.parse`.
    """
    if not is_url(text):
        return local_path(name, text)
    try:
        return BucketPath.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from error


def exists(path: str | os.PathLike) -> bool:
    """Return whether there is something at `path`, be it a broken link; False too for a name that is not possible.

    Raises:
      ConfigError: as `place`.
      OSError: a bucket cannot be asked.
    """
    where = place(path)
    return where.exists() if isinstance(where, BucketPath) else os.path.lexists(where)


def is_folder(path: str | os.PathLike) -> bool:
    """Return whether `path` is a folder; False too if it is not a possible name, for which `Path.is_dir` raises."""
    try:
        return os.path.isdir(path)  # noqa: PTH112
    except ValueError:  # a NUL in it
        return False


def local_path(name: str, text: str) -> Path:
    """Return `text` as a path on this machine, with `~` expanded also where no shell has done it (`--workdir=~/x`).

    Args:
      name: what the path is given by, for the message.
      text: what was given.

    Raises:
      ConfigError: a URL, the home folder of an unknown user, or no possible name.
    """
    if is_url(text):
        raise ConfigError(
            f"{name} {text}: only folders and files of this machine can be used; mount it there, or copy it"
        )
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name} {text}: there is no such user ({error})") from error
    try:
        os.lstat(path)
    except ValueError as error:
        raise ConfigError(f"{name} {text!r}: {error}") from error
    except OSError as error:  # nothing need be there
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{name} {text}: {error.strerror}") from error
    return path
