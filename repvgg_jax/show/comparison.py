"""Comparison of training form, deploy form and predictor on the same images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ..inference.planned_net import Output
from ..net.model import RepVGG
from .facts import Difference


def training_form_outputs(
    model: RepVGG, variables: Mapping[str, Any], images: np.ndarray, batch_size: int, output: Output
) -> np.ndarray:
    """Return the outputs of the training form in inference, with its branches and running statistics.

    Args:
      model: training form.
      variables: variables of `model`.
      images: `[N, H, W, C]`, normalised.
      batch_size: number of images to compute together.
      output: logits or pooled features.

    Returns:
      Logits `[N, classes]` or pooled features `[N, C]`.
    """
    method = "embed" if output == "embedding" else None
    with jax.disable_jit(False):  # a deep net takes minutes without jit
        return in_pieces(jax.jit(lambda x: model.apply(variables, x, method=method)), images, batch_size)


def in_pieces(function: Callable[[np.ndarray], Any], images: np.ndarray, batch_size: int) -> np.ndarray:
    """Apply `function` to `images` in batches of exactly `batch_size`, padding the last one with blank images."""
    outputs = []
    for start in range(0, len(images), batch_size):
        piece = images[start : start + batch_size]
        blank = np.zeros((batch_size - len(piece), *images.shape[1:]), images.dtype)
        outputs.append(np.asarray(function(np.concatenate([piece, blank])))[: len(piece)])
    return np.concatenate(outputs)


def difference(names: tuple[str, str], expected: np.ndarray, actual: np.ndarray, output: Output) -> Difference:
    """Return the difference between two sets of outputs for the same images.

    Args:
      names: descriptions of `expected` and `actual`.
      expected: reference outputs `[N, …]`, finite.
      actual: outputs to compare, in the same shape and finite.
      output: kind of output.
    """
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    errors, sizes = np.linalg.norm(expected - actual, axis=1), np.linalg.norm(expected, axis=1)
    relative = np.divide(errors, sizes, out=np.where(errors > 0, np.inf, 0.0), where=sizes > 0)
    agreeing = int((expected.argmax(1) == actual.argmax(1)).sum())
    return Difference(
        *names,
        images=len(expected),
        largest=float(np.abs(expected - actual).max()),
        relative=float(relative.max()),
        same_class=agreeing if output == "logits" else None,
    )
