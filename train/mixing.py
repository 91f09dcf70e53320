"""Mixup and CutMix on the device: pure functions of one device's share of a batch and a key.

Image i is mixed with image N - 1 - i of the same share, and one lambda is drawn for all of them, as in timm and in
the recipes of RepVGG. Sources: Zhang et al. 2017 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899).
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
    """Mixup or CutMix, whichever of the two is on; where both are, one is drawn.

    Args:
      key: a `jax.random` key, another one for each step and each device.
      images: float [N, H, W, C], normalised.
      targets: float [N, classes], one-hot or smoothed.
      mixup_alpha, cutmix_alpha: lambda is Beta(alpha, alpha); 0 is off. Static.
      cutmix_share: how often it is CutMix where both are on.

    Returns:
      Images and targets of the same shapes and dtypes; each target's sum is what it was.

    Raises:
      ValueError: a negative alpha, or images of integers.
    """
    if min(mixup_alpha, cutmix_alpha) < 0:
        raise ValueError(f"alphas must be at least 0, got mixup {mixup_alpha} and cutmix {cutmix_alpha}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be normalised floats before they are mixed, got {images.dtype}")
    choice_key, lambda_key, place_key = jax.random.split(key, 3)

    def by_mixup() -> tuple[Array, Array]:
        return mixup(images, targets, jax.random.beta(lambda_key, mixup_alpha, mixup_alpha))

    def by_cutmix() -> tuple[Array, Array]:
        share = jax.random.beta(lambda_key, cutmix_alpha, cutmix_alpha)
        place = jax.random.uniform(place_key, (2,)) * jnp.array(images.shape[1:3])
        return cutmix(images, targets, share, place.astype(jnp.int32))

    if mixup_alpha and cutmix_alpha:
        return jax.lax.cond(jax.random.uniform(choice_key) < cutmix_share, by_cutmix, by_mixup)
    if mixup_alpha:
        return by_mixup()
    return by_cutmix() if cutmix_alpha else (images, targets)


def mixup(images: Array, targets: Array, share: Array | float) -> tuple[Array, Array]:
    """`share` of every image and target, and the rest of its partner's.

    Args:
      images: float [N, H, W, C].
      targets: float [N, classes].
      share: lambda, in 0..1.
    """
    return _blend(images, share), _blend(targets, share)


def cutmix(images: Array, targets: Array, share: Array | float, center: Array) -> tuple[Array, Array]:
    """Every image with a rectangle of its partner's pixels, and the targets by the area that is left of it.

    Args:
      images: [N, H, W, C].
      targets: float [N, classes].
      share: lambda: the rectangle has 1 - lambda of the image's area before the image's border cuts it.
      center: int [2], row and column of the rectangle's middle.
    """
    sides = jnp.array(images.shape[1:3])
    lengths = (sides * jnp.sqrt(1 - share)).astype(jnp.int32)
    first = jnp.clip(center - lengths // 2, 0, sides)
    last = jnp.clip(center + (lengths + 1) // 2, 0, sides)
    rows, columns = (
        (jnp.arange(n) >= first[axis]) & (jnp.arange(n) < last[axis]) for axis, n in enumerate(images.shape[1:3])
    )
    inside = (rows[:, None] & columns[None, :])[None, :, :, None]
    left = 1 - jnp.prod(last - first) / (images.shape[1] * images.shape[2])
    return jnp.where(inside, images[::-1], images), _blend(targets, left)


def _blend(values: Array, share: Array | float) -> Array:
    share = jnp.asarray(share, values.dtype)
    return values * share + values[::-1] * (1 - share)
