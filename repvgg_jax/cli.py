"""Wrapper for all commands: a user error gives one line on stderr and exit status 2, never a traceback."""

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO, cast

from . import interrupts
from .errors import RepVGGError
from .extras import missing_library
from .huge_pages import restart_with_huge_pages
from .version import __version__

_PACKAGES = ("repvgg_jax", "train", "convert")


def run_module(name: str, prepare: Callable[[], object] = lambda: None, *, huge_pages: bool = False) -> NoReturn:
    """Run the `main` of the module `name` as a command, and exit with its status.

    A command's module calls this in its first lines, before its slow imports. Ctrl-C during the imports then exits
    cleanly (`interrupts`), and a missing library gives a one-line error.

    Args:
      name: name of the module.
      prepare: called before the import.
      huge_pages: restart the process with memory in huge pages, where the system supports it.
    """
    if huge_pages:
        restart_with_huge_pages()

    def main() -> None:
        prepare()
        importlib.import_module(name).main()

    interrupts.watch()
    run_command(main)
    sys.exit(0)


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main`. With `--version` as the only argument, print versions instead.

    Raises:
      SystemExit: 2 for an error the user can fix, 1 if the reader of the output has exited, 130 after Ctrl-C.
    """
    _show_every_character()
    with _recorded_stdout():
        _run(_print_version if sys.argv[1:] == ["--version"] else main)


def _run(main: Callable[[], object]) -> None:
    try:
        with _one_line_warnings():
            main()
    except RepVGGError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:  # raised only if `interrupts.watch` has no effect
        _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        hint = missing_library(error)
        if hint is None:
            raise
        _fail(f"error: {hint}", 2)
    except MemoryError as error:
        _fail(f"error: {_out_of_memory(error)}", 2)
    except SystemExit as stop:
        if not stop.code:
            _check_stdout()
        elif _stdout_error() is not None:
            _discard(sys.stdout)
        raise
    except OSError:
        _check_stdout()
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's error, matched by text: its class would need JAX imported
            raise
        _fail(f"error: {_out_of_memory(error)}", 2)
    _check_stdout()


def _fail(line: str, status: int) -> NoReturn:
    # Pending orbax and tensorstore tasks may still fail; asyncio would log that when it collects them.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    if _stdout_error() is not None:
        _discard(sys.stdout)
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # stderr may be on the same full disk as stdout
        _discard(sys.stderr)
    sys.exit(status)


def _out_of_memory(error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"out of memory ({reason or 'no details'}); use smaller images or a smaller batch"


def _check_stdout() -> None:
    """Exit if the output cannot be written."""
    error = _stdout_error()
    if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has exited
        _discard(sys.stdout)
        sys.exit(1)
    if error is not None:
        _fail(f"error: cannot write to stdout: {error.strerror or error}", 2)


class _Stdout:
    """A stream that remembers the first error of writing to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._recording():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._recording():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise


@contextlib.contextmanager
def _recorded_stdout() -> Iterator[None]:
    """Record errors of writing to stdout, so that `_stdout_error` can tell them from other OSErrors."""
    before: Any = sys.stdout
    if before is not None:  # closed by the shell
        sys.stdout = cast(TextIO, _Stdout(before))
    try:
        yield
    finally:
        sys.stdout = before


def _stdout_error() -> OSError | None:
    """Return the error of writing to stdout, or None."""
    if isinstance(sys.stdout, _Stdout) and sys.stdout.error is not None:
        return sys.stdout.error
    try:
        if sys.stdout is not None:  # closed by the shell
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that Python does not fail when it flushes it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_version() -> None:
    print(version_line())


def version_line() -> str:
    """Return the versions of this package, its main libraries and Python, as needed in a bug report."""
    import importlib.metadata  # slow to import and rarely needed
    import platform

    libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    return f"repvgg-jax {__version__} ({', '.join(libraries)}, Python {platform.python_version()})"


def _show_every_character() -> None:
    r"""Print `\xe9` for a character that the locale's encoding lacks, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings and our log records on one line, without the code location, which does not help a user."""

    def one_line(message: Warning | str, *_place: object, **_line: object) -> str:
        return f"warning: {' '.join(str(message).split())}\n"

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)

    before, loggers, lines = warnings.formatwarning, [logging.getLogger(name) for name in _PACKAGES], Lines()
    warnings.formatwarning = one_line
    for logger in loggers:
        logger.addHandler(lines)
        logger.propagate = False  # other libraries may have added handlers to the root logger
    try:
        yield
    finally:
        warnings.formatwarning = before
        for logger in loggers:
            logger.removeHandler(lines)
            logger.propagate = True
