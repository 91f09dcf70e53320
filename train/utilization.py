"""What a training step costs and what a device could do: the two sides of model FLOP utilisation."""

from repvgg_jax.net.summary import summarize
from repvgg_jax.net.variants import Variant

from .chips import chip_of


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak floating-point operations a second of one device (a TPU core counts as JAX counts devices).

    None for devices not in the table of `chips`.
    """
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak(dtype)


def training_flops(variant: Variant, image_size: int, num_classes: int) -> float:
    """Floating-point operations of one training step on one image: forward, and twice that backward.

    Two a multiply-add, convolutions and classifier of the training form only; what remat computes again is not
    counted (model, not hardware, utilisation).
    """
    return 3 * 2 * summarize(variant, image_size=image_size, num_classes=num_classes).train_flops
