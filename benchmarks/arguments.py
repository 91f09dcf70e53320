"""Command-line arguments of the benchmarks: a mistake gives one line, as in the other commands.

This module imports neither JAX nor NumPy, as workers that measure another library parse arguments too.
"""

import argparse
from typing import NoReturn

from repvgg_jax.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Parser that raises `ConfigError` for a mistake; `repvgg_jax.cli.run_command` prints it as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for argparse's `message`."""
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def positive_int(text: str) -> int:
    """Return a positive whole number."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text}")
    return int(text)


def positive_float(text: str) -> float:
    """Return a positive number."""
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
