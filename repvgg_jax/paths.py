"""Paths as users type them, and their conversion into local or bucket paths (`place`)."""

import errno
import os
import re
from pathlib import Path

from .errors import ConfigError
from .storage import LIBRARIES, BucketPath

Place = Path | BucketPath
"""A file or folder, on this machine or in a bucket."""


def is_url(text: str) -> bool:
    """Return whether `text` is a URL (`gs://…`, `s3://…`), not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def in_bucket(path: str | os.PathLike) -> bool:
    """Return whether `path` is the URL of an object or folder in a bucket."""
    return os.fspath(path).lower().startswith(tuple(f"{scheme}://" for scheme in LIBRARIES))


def expand_home(path: str | os.PathLike) -> str:
    """Return `path` with `~` expanded, or unchanged if there is no such user; a trailing slash is kept."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 (Path.expanduser raises and drops the slash)


def place(path: str | os.PathLike) -> Place:
    """Return `path` as a BucketPath if it is a URL, else as a local Path with `~` expanded.

    Raises:
      ConfigError: as `BucketPath.parse`.
    """
    if isinstance(path, BucketPath):
        return path
    return BucketPath.parse(os.fspath(path)) if is_url(os.fspath(path)) else Path(expand_home(path))


def option_place(name: str, text: str) -> Place:
    """Return an option's value as a BucketPath if it is a URL, or else as a local path (see `local_path`).

    Args:
      name: the option, for the error message.
      text: its value.

    Raises:
      ConfigError: as `local_path` for a path, and as `BucketPath.parse` for a URL.
    """
    if not is_url(text):
        return local_path(name, text)
    try:
        return BucketPath.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from error


def exists(path: str | os.PathLike) -> bool:
    """Return whether `path` exists: True for a broken link, False for an invalid name.

    Raises:
      ConfigError: as `place`.
      OSError: the bucket cannot be reached.
    """
    where = place(path)
    return where.exists() if isinstance(where, BucketPath) else os.path.lexists(where)


def is_folder(path: str | os.PathLike) -> bool:
    """Return whether `path` is a folder; False for an invalid name, where `Path.is_dir` raises."""
    try:
        return os.path.isdir(path)  # noqa: PTH112
    except ValueError:  # a NUL in it
        return False


def local_path(name: str, text: str) -> Path:
    """Return `text` as a local path, with `~` expanded where the shell does not do so (`--workdir=~/x`).

    Args:
      name: option or argument that the path comes from, for the error message.
      text: its value.

    Raises:
      ConfigError: `text` is a URL, the home folder of an unknown user, or an invalid name.
    """
    if is_url(text):
        raise ConfigError(f"{name} {text}: only local files and folders can be used; mount it or copy it first")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name} {text}: there is no such user ({error})") from error
    try:
        os.lstat(path)
    except ValueError as error:
        raise ConfigError(f"{name} {text!r}: {error}") from error
    except OSError as error:  # the path need not exist
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{name} {text}: {error.strerror}") from error
    return path
