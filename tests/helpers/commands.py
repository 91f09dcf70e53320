"""Commands run in this process, which avoids starting Python and JAX for each."""

import contextlib
import dataclasses
import importlib
import io
import sys
from unittest import mock

from repvgg_jax.cli import run_command


@dataclasses.dataclass(frozen=True)
class Done:
    """Exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def command(module: str, *arguments: object) -> Done:
    """Run `python -m MODULE ARGUMENTS`."""
    main = importlib.import_module(module).main
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = [module, *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            run_command(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def convert(*arguments: object) -> Done:
    """Run `python -m convert ARGUMENTS`."""
    return command("convert.__main__", *arguments)


def error_of(done: Done) -> str:
    """Return the one line on stderr of a command, which must have failed the way a user's mistake should."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr
