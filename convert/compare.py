"""Comparison of two nets' logits."""

from typing import Any

import jax
import numpy as np

import repvgg_jax as rv


def logits_of(model: rv.RepVGG, variables: Any, images: np.ndarray | jax.Array) -> np.ndarray:
    """Return a model's logits, computed in full float32 precision.

    Runs layer by layer, because many layers share a shape and compiling the whole net for one batch takes longer.
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.apply(variables, images))


def relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return `||expected - actual|| / ||expected||`, in float64 to avoid overflow; NaN if any logit is not finite."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return float("nan")
    norm = np.linalg.norm(expected)
    difference = np.linalg.norm(expected - actual)
    return float(difference / norm) if norm else float(difference)
