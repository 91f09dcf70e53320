"""Convolutions of the deploy form: the model's default, and one with a chosen algorithm."""

import functools

import numpy as np
from jax import Array

from .algorithm import ALGORITHMS, Options
from .sharding import explicitly_sharded
from .xla import on_cpu, out_pixels, product_conv, xla_conv

SMALL_FORWARD = {1: 9, 2: 64}
"""Output pixels per image up to which a matrix product is faster on a CPU, by stride (measured on two AVX2 and two
AVX-512 cores)."""


def deploy_conv(x: Array, kernel: Array, stride: int = 1, groups: int = 1, dilation: int = 1) -> Array:
    """Compute the same as `xla_conv`, with the deploy form's default algorithm, used where there is no plan.

    On CPUs, 1x1 kernels and small images are computed as matrix products. Differentiable in every mode, with XLA's
    gradient.
    """
    xla, product = (
        functools.partial(function, stride=stride, groups=groups, dilation=dilation)
        for function in (xla_conv, product_conv)
    )
    large = kernel.shape[0] > 1 and out_pixels(x, stride) > SMALL_FORWARD[stride]
    if large or explicitly_sharded(x, kernel):
        return xla(x, kernel)
    return on_cpu(product, xla, x, kernel)


def prepare_kernel(kernel: np.ndarray, algorithm: str, *, groups: int = 1) -> np.ndarray:
    """Return the kernel in the layout that `convolve` needs for `algorithm`; call it once, ahead of time.

    Args:
      kernel: `[3, 3, C_in // groups, C_out]`.
      algorithm: one of `ALGORITHMS`.
      groups: groups of the convolution.
    """
    return ALGORITHMS[algorithm].prepare(kernel, groups)


def convolve(
    x: Array,
    prepared: Array,
    bias: Array,
    *,
    algorithm: str = "direct",
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    relu: bool = False,
) -> Array:
    """Compute a 3x3 convolution with `dilation` pixels of zero padding per side, plus bias, by a chosen algorithm.

    Args:
      x: `[N, H, W, C_in]`, any height and width.
      prepared: the kernel, prepared for the same algorithm and groups (`prepare_kernel`).
      bias: `[C_out]`.
      algorithm: one of `ALGORITHMS`.
      stride: 1 or 2.
      groups: groups of the convolution.
      dilation: distance between the kernel's taps in pixels.
      relu: whether to apply ReLU.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.

    Raises:
      ValueError: the algorithm does not support the stride, dilation or dtype.
    """
    refusal = ALGORITHMS[algorithm].refusal(x.dtype.name, stride, dilation)
    if refusal:
        raise ValueError(refusal)
    return ALGORITHMS[algorithm].compute(x, prepared, bias, Options(stride, groups, dilation, relu))
