"""What every command shares: a user's mistake is one line on stderr and exit status 2, never a traceback."""

import contextlib
import importlib.metadata
import io
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Iterator

from .errors import RepVGGError
from .version import __version__

_PACKAGES = ("repvgg_jax", "train", "convert")


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and leave the process with its status.

    0 when it returns, 2 for an error the user can mend, 130 after Ctrl-C. `--version` as the only argument prints
    versions in place of running it.
    """
    _show_every_character()
    if sys.argv[1:] == ["--version"]:
        print(version_line())
        return
    try:
        with _one_line_warnings():
            main()
    except RepVGGError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        sys.exit(1)


def version_line() -> str:
    """Return this package's version, and those that a report of a fault needs besides."""
    libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    return f"repvgg-jax {__version__} ({', '.join(libraries)}, Python {platform.python_version()})"


def _show_every_character() -> None:
    """Print `\\xe9` for a character that the locale's encoding lacks, where Python would raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings, and what our own loggers say, without the place in the code, of which a command's user has no use."""

    def one_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        del category, filename, lineno, line
        return f"warning: {' '.join(str(message).split())}\n"

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)

    before, loggers, lines = warnings.formatwarning, [logging.getLogger(name) for name in _PACKAGES], Lines()
    warnings.formatwarning = one_line
    for logger in loggers:
        logger.addHandler(lines)
        logger.propagate = False  # to handlers that other libraries may have given the root logger
    try:
        yield
    finally:
        warnings.formatwarning = before
        for logger in loggers:
            logger.removeHandler(lines)
            logger.propagate = True
