"""Paths as users type them."""

import re
from pathlib import Path

from .errors import ConfigError


def local_path(name: str, text: str) -> Path:
    """Return `text` as a path on this machine, with `~` expanded also where no shell has done it (`--workdir=~/x`).

    Args:
      name: what the path is given by, for the message.
      text: what was given.

    Raises:
      ConfigError: a URL (`gs://…`, `s3://…`), or the home folder of an unknown user.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ConfigError(
            f"{name} {text}: only folders and files of this machine can be used; mount it there, or copy it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name} {text}: there is no such user ({error})") from error
