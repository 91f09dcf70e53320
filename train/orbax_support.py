"""Support for orbax in `Checkpoints`: folders with any name, and its messages in the run's log."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from repvgg_jax.errors import ConfigError
from repvgg_jax.weights.training_run import without_late_failures


class LiteralPath(type(epath.Path())):
    """A path whose `glob` interprets only the pattern.

    etils's `glob` also interprets the folder's name as a pattern, and so finds nothing below `lr=[0.1]`.
    """

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """Yield the paths in this folder that match `pattern`."""
        for match in Path(self).glob(pattern):
            yield type(self)(match)


def check_folder_name(option: str, folder: Path) -> None:
    """Refuse a folder whose name tensorstore or etils would misread.

    Raises:
      ConfigError: a part of its path ends with a colon or, unless it is a path separator, contains a backslash.
    """
    for part in folder.absolute().parts[1:]:
        if part.endswith(":") or ("\\" in part and os.sep != "\\"):
            raise ConfigError(f"{option} {folder}: checkpoints cannot be kept in a folder called {part!r}; rename it")


@contextlib.contextmanager
def orbax_messages(note: Callable[[str], None]) -> Iterator[None]:
    """Pass orbax's warnings to `note`, one line each, without the tracebacks of exceptions that it also raises."""
    logger = logging.getLogger("absl")

    def passed_on(record: logging.LogRecord) -> bool:
        return _filter_orbax(record, note)

    logger.addFilter(passed_on)
    try:
        with without_late_failures():
            yield
    finally:
        logger.removeFilter(passed_on)


# Most checkpoints are written without an evaluation, and a slow disk is visible in the images per second.
_ROUTINE = ("did not provide metrics", "Waiting for previous save to complete")


def _filter_orbax(record: logging.LogRecord, note: Callable[[str], None]) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname or record.levelno < logging.WARNING:
        return True
    message = record.getMessage()
    if not record.exc_info and not any(text in message for text in _ROUTINE):  # an exception is raised as well
        note(f"orbax: {' '.join(message.split())}")
    return False
