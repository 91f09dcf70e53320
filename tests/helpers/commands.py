"""Commands run in this process, which spares each of them the start of Python and JAX."""

import contextlib
import dataclasses
import importlib
import io
import sys
from unittest import mock

from repvgg_jax.cli import run_command


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: its status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(module: str, *arguments: object) -> Done:
    """`python -m MODULE …`, in this process."""
    main = importlib.import_module(module).main
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = [module, *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            run_command(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
