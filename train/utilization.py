"""What a training step costs and what a device could do: the two sides of model FLOP utilisation."""

from repvgg_jax.net.summary import summarize
from repvgg_jax.net.variants import Variant

# Dense bfloat16 peak of one device, floating-point operations a second, from the makers' data sheets.
_BFLOAT16_PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "V100": 125e12,
    "L4": 121e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak floating-point operations a second of one device (a TPU core counts as JAX counts devices).

    float32 runs as TF32 on NVIDIA GPUs, at half the bfloat16 rate, and as bfloat16 passes on TPUs.
    None for devices not in the table.
    """
    for name, peak in _BFLOAT16_PEAK.items():
        if name in device_kind:
            return peak if dtype == "bfloat16" or name.startswith("TPU") else peak / 2
    return None


def training_flops(variant: Variant, image_size: int, num_classes: int) -> float:
    """Floating-point operations of one training step on one image: forward, and twice that backward.

    Two a multiply-add, convolutions and classifier of the training form only; what remat computes again is not
    counted (model, not hardware, utilisation).
    """
    return 3 * 2 * summarize(variant, image_size=image_size, num_classes=num_classes).train_flops
