"""A training step's operations and a device's peak rate, from which model FLOP utilisation is computed."""

from repvgg_jax.net.summary import summarize
from repvgg_jax.net.variants import Variant

from .chips import chip_of


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the peak floating-point operations per second of one device, as JAX counts devices.

    None for devices that are not in the table of `chips`.
    """
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak(dtype)


def training_flops(variant: Variant, image_size: int, num_classes: int) -> float:
    """Return the floating-point operations of one training step on one image: forward, and twice that backward.

    Two per multiply-add, for convolutions and classifier of the training form only. What remat computes again is not
    counted, as this is model utilisation, not hardware utilisation.
    """
    return 3 * 2 * summarize(variant, image_size=image_size, num_classes=num_classes).train_flops
