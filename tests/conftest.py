"""What every test may use: models with weights at which an equivalence test is not empty."""

import os
import signal

# Before JAX starts: four virtual devices, so that data parallelism is real in every test that trains.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

# A shell has its background jobs ignore Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from typing import Any

import numpy as np
from random_weights import random_variables

__all__ = ["random_variables", "relative_difference"]

pytest_plugins = ["run_helpers"]


def relative_difference(expected: Any, found: Any) -> float:
    """`||expected - found|| / ||expected||`, in float64."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))
