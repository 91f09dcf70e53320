"""The native convolution in training: with a kernel that changes at every step, and with its gradients.

Float32. The three functions are linear in each of their two arrays, and reverse-mode differentiable any number of
times.
"""

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from . import INPUT_GRADIENT, KERNEL_GRADIENT, PACK, convolve, lanes


class Use(IntEnum):
    """Which convolution a kernel is packed for (`gradients.h`)."""

    FORWARD = 0
    BACKWARD = 1
    SPREAD = 2


def pack(kernel: Array, groups: int, tile: int, use: Use) -> Array:
    """A kernel as the native convolutions take it (`native.pack_kernel`), inside of a jitted function.

    Args:
      kernel: float32 `[3, 3, C_in // groups, C_out]` of the forward convolution.
      groups: of the convolution.
      tile: 0 for the direct sum, else Winograd's m.
      use: FORWARD; or BACKWARD for the gradient to the input of stride 1, SPREAD for that of stride 2 (tile 0).
    """
    _, _, inner, outer = kernel.shape
    inner, columns = (inner, outer // groups) if use == Use.FORWARD else (outer // groups, inner)
    positions = (tile + 2) ** 2 if tile else 9
    shape = (groups, -(-columns // lanes()), positions, inner, lanes())
    call = jax.ffi.ffi_call(PACK, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(kernel, groups=np.int64(groups), tile=np.int64(tile), use=np.int64(use))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: Array, kernel: Array, stride: int, groups: int, tile: int) -> Any:
    """3x3 convolution with padding 1: `[N, H, W, C_in]` to `[N, ceil(H / stride), ceil(W / stride), C_out]`."""
    return _convolve(x, pack(kernel, groups, tile, Use.FORWARD), kernel.shape[3], stride, groups, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def input_gradient(gradient: Array, kernel: Array, size: tuple[int, int], stride: int, groups: int, tile: int) -> Array:
    """`conv`'s gradient to its input, whose height and width are given."""
    if stride == 1:
        inputs = kernel.shape[2] * groups
        return _convolve(gradient, pack(kernel, groups, tile, Use.BACKWARD), inputs, stride, groups, tile)
    shape = (gradient.shape[0], *size, kernel.shape[2] * groups)
    call = jax.ffi.ffi_call(INPUT_GRADIENT, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(gradient, pack(kernel, groups, 0, Use.SPREAD), groups=np.int64(groups))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def kernel_gradient(x: Array, gradient: Array, stride: int, groups: int, tile: int) -> Any:
    """`conv`'s gradient to its kernel, `[3, 3, C_in // groups, C_out]`."""
    shape = (3, 3, x.shape[3] // groups, gradient.shape[3])
    call = jax.ffi.ffi_call(KERNEL_GRADIENT, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(x, gradient, stride=np.int64(stride), groups=np.int64(groups), tile=np.int64(tile))


def _convolve(x: Array, packed: Array, outputs: int, stride: int, groups: int, tile: int) -> Array:
    bias = jnp.zeros(outputs, jnp.float32)
    return convolve(x, packed, bias, tile=tile, stride=stride, groups=groups, relu=False)


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
