"""What every command shares: a user's mistake is one line on stderr and exit status 2, never a traceback."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

from .errors import RepVGGError

_PACKAGES = ("repvgg_jax", "train", "convert")


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and leave the process with its status.

    0 when it returns, 2 for an error the user can mend, 130 after Ctrl-C.
    """
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
