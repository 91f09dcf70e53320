"""The native convolution for training, where the kernel changes at every step, and its gradients.

All arrays are float32. The three functions are linear in each of their two arrays, and differentiable in reverse mode
any number of times.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ..sharding import varying_axes, varying_over
from . import INPUT_GRADIENT, KERNEL_GRADIENT, TRAINING


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: Array, kernel: Array, stride: int, groups: int, tile: int) -> Any:
    """Compute a 3x3 convolution with padding 1, without bias.

    Args:
      x: `[N, H, W, C_in]`.
      kernel: `[3, 3, C_in // groups, C_out]`.
      stride: 1 or 2.
      groups: groups of the convolution.
      tile: 0 for the direct sum, else Winograd's m (2 or 4), which needs stride 1; also used for the gradients.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), kernel.shape[3])
    return _call(TRAINING, x, kernel, shape, stride, groups, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def input_gradient(gradient: Array, kernel: Array, size: tuple[int, int], stride: int, groups: int, tile: int) -> Any:
    """Return the gradient of `conv` with respect to its input, whose height and width are `size`."""
    shape = (gradient.shape[0], *size, kernel.shape[2] * groups)
    return _call(INPUT_GRADIENT, gradient, kernel, shape, stride, groups, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def kernel_gradient(x: Array, gradient: Array, stride: int, groups: int, tile: int) -> Any:
    """Return the gradient of `conv` with respect to its kernel, `[3, 3, C_in // groups, C_out]`."""
    shape = (3, 3, x.shape[3] // groups, gradient.shape[3])
    return _call(KERNEL_GRADIENT, x, gradient, shape, stride, groups, tile)


def _call(target: str, a: Array, b: Array, shape: tuple[int, ...], stride: int, groups: int, tile: int) -> Array:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    result = call(a, b, stride=np.int64(stride), groups=np.int64(groups), tile=np.int64(tile))
    return varying_over(varying_axes(a, b), result)


# Each of the three is bilinear, and its gradients are the other two.


def _conv_backward(stride, groups, tile, saved, cotangent):
    x, kernel = saved
    to_input = input_gradient(cotangent, kernel, x.shape[1:3], stride, groups, tile)
    return to_input, kernel_gradient(x, cotangent, stride, groups, tile)


def _input_gradient_backward(size, stride, groups, tile, saved, cotangent):
    gradient, kernel = saved
    to_kernel = kernel_gradient(cotangent, gradient, stride, groups, tile)
    return conv(cotangent, kernel, stride, groups, tile), to_kernel


def _kernel_gradient_backward(stride, groups, tile, saved, cotangent):
    x, gradient = saved
    to_input = input_gradient(gradient, cotangent, x.shape[1:3], stride, groups, tile)
    return to_input, conv(x, cotangent, stride, groups, tile)


def _define_gradients(function: Callable, backward: Callable) -> None:
    function.defvjp(lambda a, b, *rest: (function(a, b, *rest), (a, b)), backward)  # pyright: ignore


_define_gradients(conv, _conv_backward)
_define_gradients(input_gradient, _input_gradient_backward)
_define_gradients(kernel_gradient, _kernel_gradient_backward)
