"""`python -m convert`, run within the test's process."""

import contextlib
import dataclasses
import io
import sys
from unittest import mock

from convert.__main__ import main
from repvgg_jax.cli import run_command


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: its status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def convert(*arguments: object) -> Done:
    """Run the command, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", [""]):
        sys.argv += map(str, arguments)
        try:
            run_command(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def error_of(done: Done) -> str:
    """Its one line on stderr, once it is sure that it failed as a user's mistake should."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr
