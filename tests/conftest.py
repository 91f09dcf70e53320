"""Set-up for every test: four virtual devices, and Ctrl-C that reaches the commands that tests start."""

import os
import signal

import pytest

from tests.helpers.xla_flags import QUICK_TO_COMPILE, xla_flags

# A shell makes its background jobs ignore Ctrl-C, and `nohup` makes them ignore hang-ups. Commands started by tests
# would inherit that, and ignore the signals that tests send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

pytest_plugins = ["tests.helpers.buckets", "tests.helpers.hub", "tests.helpers.runs"]


def pytest_configure(config: pytest.Config) -> None:
    """Set up four virtual devices before JAX starts, so that data parallelism is real in every test that trains.

    Tests that are not slow also get options for processes that live briefly and share few cores.
    """
    if config.option.markexpr != "slow":
        os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)
        # Idle threads of PyTorch sleep: two processes of tests share the cores, and must not wait for them in loops.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["XLA_FLAGS"] = xla_flags(4)
