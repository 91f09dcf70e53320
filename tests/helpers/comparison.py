"""Comparison of arrays."""

from typing import Any

import numpy as np


def relative_difference(expected: Any, actual: Any) -> float:
    """Return `||expected - actual|| / ||expected||`, in float64."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    return float(np.linalg.norm(expected - actual) / np.linalg.norm(expected))
