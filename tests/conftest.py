"""What every test may use: models with weights at which an equivalence test is not empty."""

import os

# Before JAX starts: four virtual devices, so that data parallelism is real in every test that trains.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

from typing import Any

import numpy as np
from random_weights import random_variables

__all__ = ["random_variables", "relative_difference"]

pytest_plugins = ["run_helpers"]


def relative_difference(expected: Any, found: Any) -> float:
    """`||expected - found|| / ||expected||`, in float64."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))
