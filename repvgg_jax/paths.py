"""Paths as users type them."""

import errno
import os
import re
from pathlib import Path

from .errors import ConfigError


def is_url(text: str) -> bool:
    """Return whether `text` is a URL (`gs://…`, `s3://…`) and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def expand_home(path: str | os.PathLike) -> str:
    """Return `path` with `~` expanded, or as it is where no user has that name. A final slash stays."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 (Path's own raises and drops the slash)


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
