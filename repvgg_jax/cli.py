"""What every command shares: a user's mistake is one line on stderr and exit status 2, never a traceback."""

import sys
from collections.abc import Callable

from .errors import RepVGGError


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and leave the process with its status.

    0 when it returns, 2 for an error the user can mend, 130 after Ctrl-C.
    """
    try:
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
