"""Mixup and CutMix on the device: pure functions of one device's share of a batch and a key.

Image i is mixed with image N - 1 - i of the same share, and one lambda is drawn for all of them, as in timm and in
RepVGG's recipes. Sources: Zhang et al. 2017 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899).
"""

import jax
import jax.numpy as jnp
from jax import Array


def mix(
    key: Array,
    images: Array,
    targets: Array,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    cutmix_share: float = 0.5,
) -> tuple[Array, Array]:
    """Apply mixup or CutMix, whichever is on; if both are, one of them is drawn.

    Args:
      key: a `jax.random` key, which must differ between steps and devices.
      images: float `[N, H, W, C]`, normalised.
      targets: float `[N, classes]`, one-hot or smoothed.
      mixup_alpha: lambda of mixup is drawn from Beta(alpha, alpha); 0 turns it off. Static.
      cutmix_alpha: lambda of CutMix is drawn from Beta(alpha, alpha); 0 turns it off. Static.
      cutmix_share: probability of CutMix if both are on.

    Returns:
      Images and targets of the same shapes and dtypes; each target keeps its sum.

    Raises:
      ValueError: an alpha is negative, or the images are integers.
    """
    if min(mixup_alpha, cutmix_alpha) < 0:
        raise ValueError(f"alphas must be at least 0, got mixup {mixup_alpha} and cutmix {cutmix_alpha}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be normalised floats before they are mixed, got {images.dtype}")
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    choice_key, lambda_key, place_key = jax.random.split(key, 3)
    by_cutmix = jax.random.uniform(choice_key) < cutmix_share if mixup_alpha and cutmix_alpha else bool(cutmix_alpha)
    alpha = jnp.where(by_cutmix, cutmix_alpha, mixup_alpha)
    share = jax.random.beta(lambda_key, alpha, alpha)
    drawn = jax.random.uniform(place_key, (2,))
    place = (drawn * jnp.array(images.shape[1:3], drawn.dtype)).astype(jnp.int32)
    # Not `lax.cond`, for which some backends involve the host; both are cheap.
    weights = jnp.where(by_cutmix, outside_rectangle(images.shape, share, place), share)
    return blend_with_partner(images, targets, weights)


def outside_rectangle(shape: tuple[int, ...], share: Array | float, center: Array) -> Array:
    """Return CutMix's weights: 0 inside a rectangle of each image and 1 outside, float32 `[1, H, W, 1]`.

    Args:
      shape: shape of the images, `[N, H, W, C]`.
      share: lambda; the rectangle has 1 - lambda of the image's area, before the image's border clips it.
      center: int `[2]`, row and column of the rectangle's centre.
    """
    insides = []
    for length, middle in zip(shape[1:3], center, strict=True):
        side = (length * jnp.sqrt(1 - share)).astype(jnp.int32)
        place = jnp.arange(length)
        insides.append((place >= middle - side // 2) & (place < middle + (side + 1) // 2))
    rows, columns = insides
    inside = rows[None, :, None, None] & columns[None, None, :, None]
    return 1.0 - inside.astype(jnp.float32)


def blend_with_partner(images: Array, targets: Array, weights: Array | float) -> tuple[Array, Array]:
    """Return the sum of every image times `weights` and its partner times `1 - weights`; targets by the weights' mean.

    Args:
      images: float `[N, H, W, C]`.
      targets: float `[N, classes]`.
      weights: in 0..1; one number (mixup's lambda), or `[1, H, W, 1]`.
    """
    weights = jnp.asarray(weights)
    return _blend(images, weights), _blend(targets, weights.mean())


def _blend(values: Array, share: Array) -> Array:
    share = share.astype(values.dtype)
    return values * share + values[::-1] * (1 - share)
