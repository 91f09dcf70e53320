"""How a deploy-form 3x3 convolution is computed."""

from jax import Array, lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv3x3(x: Array, kernel: Array, bias: Array, *, stride: int = 1, groups: int = 1) -> Array:
    """3x3 convolution with one pixel of zero padding on every side, plus bias.

    PyTorch's `Conv2d(kernel_size=3, padding=1)`: with stride 2 it pads before *and* after, which Flax's
    `"SAME"` does not.

    Args:
      x: `[N, H, W, C_in]`.
      kernel: `[3, 3, C_in // groups, C_out]`, same dtype as `x`.
      bias: `[C_out]`.
      stride: 1 or 2.
      groups: groups of the convolution.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    out = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )
    return out + bias
