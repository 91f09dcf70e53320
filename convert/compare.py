"""How far two nets' logits are apart."""

import numpy as np


def relative_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Return `||expected - found|| / ||expected||`, in float64: no square overflows; NaN if a logit is not finite."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("nan")
    norm = np.linalg.norm(expected)
    difference = np.linalg.norm(expected - found)
    return float(difference / norm) if norm else float(difference)
