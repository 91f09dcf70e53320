"""What holds for every test: four virtual devices, and Ctrl-C that reaches the commands that tests start."""

import os
import signal

import pytest

from tests.helpers.xla_flags import QUICK_TO_COMPILE, xla_flags

# A shell has its background jobs ignore Ctrl-C, and `nohup` the end of the terminal; so would every command that a test
# starts and sends such a signal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

pytest_plugins = ["tests.helpers.buckets", "tests.helpers.hub", "tests.helpers.runs"]


def pytest_configure(config: pytest.Config) -> None:
    """Set, before JAX starts, four virtual devices, so that data parallelism is real in every test that trains."""
    if config.option.markexpr != "slow":
        os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)
    os.environ["XLA_FLAGS"] = xla_flags(4)
