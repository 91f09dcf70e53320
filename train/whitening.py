"""A first stage that whitens the images, computed from them instead of trained (arXiv 2404.00498, section 3.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.errors import ConfigError
from repvgg_jax.net.branches import DENSE, SUM_BN
from repvgg_jax.preprocess import Preprocessing, normalize

from . import data
from .state import TrainState

STAGE = "stage0"
_IMAGES, _PATCHES = 2000, 32  # at most so many images, and patches of each image in both directions
_NOISE = 5e-3
"""Added to each component's variance (pixels are normalised to about 1) so that mere noise is not amplified."""


@dataclasses.dataclass(frozen=True)
class Whitening:
    """A 3x3 convolution whose outputs are uncorrelated over the images, with the outputs' moments.

    Attributes:
      kernel: `[3, 3, C, F]`: principal components of the images' patches, followed by their negatives, so that a ReLU
        loses nothing.
      mean: means of the outputs, `[F]`.
      variance: variances of the outputs, `[F]`.
    """

    kernel: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def put_into(self, state: TrainState) -> TrainState:
        """Return a fresh state with this convolution, normalised, as stage 0, whose other branches are set to 0."""
        params, stats = state.params[STAGE], state.batch_stats[STAGE]
        dense = DENSE.name
        silent = {
            name: tree if name in (dense, SUM_BN) else jax.tree.map(jnp.zeros_like, tree)
            for name, tree in params.items()
        }
        kernel = jnp.asarray(self.kernel, params[dense]["conv"]["kernel"].dtype)
        moments = {"mean": jnp.asarray(self.mean), "var": jnp.asarray(self.variance)}
        params = silent | {dense: params[dense] | {"conv": {"kernel": kernel}}}
        stats = stats | {dense: {"bn": moments}}
        state = state.replace(params=state.params | {STAGE: params}, batch_stats=state.batch_stats | {STAGE: stats})
        if state.ema_params is None:
            return state
        return state.replace(
            ema_params=state.ema_params | {STAGE: params}, ema_batch_stats=state.ema_batch_stats | {STAGE: stats}
        )


def whitening_of(source: data.Source, preprocessing: Preprocessing, features: int) -> Whitening:
    """Compute the whitening of a source's images from an evenly spaced sample of them.

    Args:
      source: the training images.
      preprocessing: their preparation as the net's input.
      features: output channels of the convolution.

    Raises:
      ConfigError: `features` is odd, or larger than twice the number of principal components.
      DataError: no image can be read.
    """
    components = 9 * preprocessing.channels
    if features % 2 or features > 2 * components:
        raise ConfigError(
            f"--whiten-stem needs an even number of channels in stage 0, at most {2 * components}, not {features}: "
            "set --widths, or --no-whiten-stem"
        )
    mean, covariance = _patch_moments(source, preprocessing)
    variance, directions = (part[..., ::-1] for part in np.linalg.eigh(covariance))  # largest first
    directions = directions[:, : features // 2]
    both = np.concatenate([directions, -directions], axis=1)
    return Whitening(
        both.reshape(3, 3, -1, features).astype(np.float32),
        (mean @ both).astype(np.float32),
        (np.tile(variance[: features // 2], 2).clip(0) + _NOISE).astype(np.float32),
    )


def _patch_moments(source: data.Source, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean `[9 C]` and covariance `[9 C, 9 C]` of the 3x3 patches, in the order of a kernel's elements."""
    sample = _Sample(source, -(-len(source) // _IMAGES))
    total: Any = 0.0
    products: Any = 0.0
    count = 0
    with data.eval_batches(sample, batch_size=32, local_device_count=1, preprocessing=preprocessing) as batches:
        for batch in batches:
            images = np.asarray(normalize(batch["image"][0][batch["mask"][0] > 0], preprocessing), np.float32)
            for image in images:
                windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(0, 1))
                spacing = -(-image.shape[0] // _PATCHES)
                patches = windows[::spacing, ::spacing].transpose(0, 1, 3, 4, 2).reshape(-1, 9 * preprocessing.channels)
                total = total + patches.sum(0, dtype=np.float64)
                products = products + (patches.T @ patches).astype(np.float64)
                count += len(patches)
    mean = total / count
    return mean, products / count - np.outer(mean, mean)


class _Sample:
    """Every n-th example of a source."""

    def __init__(self, source: data.Source, step: int) -> None:
        self._source, self._step = source, step

    @property
    def class_names(self) -> list[str]:
        return self._source.class_names

    def __len__(self) -> int:
        return -(-len(self._source) // self._step)

    def __getitem__(self, index: int, /) -> data.Example:
        return self._source[index * self._step]
