"""How far two arrays are apart."""

from typing import Any

import numpy as np


def relative_difference(expected: Any, found: Any) -> float:
    """`||expected - found|| / ||expected||`, in float64."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))
