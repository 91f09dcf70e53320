"""Convolutions of the training form, with gradients that are fast on CPUs, and a barrier between blocks.

On GPU and TPU everything here is XLA's convolution with XLA's gradient, on TPUs with small groups merged. On CPUs, in
float32 and with a C++ compiler, 3x3 convolutions and both their gradients are those of `native` (Winograd's where that
is faster). XLA's CPU backend has a usable forward convolution for large images, but its kernel gradient takes 2 to 7
times as long as the same sum in matrix products, and images of a few pixels take a path 20 times slower than one
product. So in all other cases

* a 1x1 convolution is a matrix product;
* the gradient of a kernel is one product for each of its positions (taps), `[C_in, P] @ [P, C_out]`;
* the gradient of the input, for strided layers and small images, is one product whose columns are scattered back;
* the forward pass of small images is one product over gathered columns (im2col).

`benchmarks/train_step.py` measures the effect on whole training steps.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .algorithm import candidates
from .cost import LayerShape, native_training_seconds
from .deploy import SMALL_FORWARD, deploy_conv
from .native import training as native_training
from .sharding import explicitly_sharded, varying_axes, varying_over
from .xla import by_group, groups_per_vector, merged_groups, on_cpu, out_pixels, taps, xla_conv

# Output pixels per image up to which matrix products are faster on a CPU (measured like `SMALL_FORWARD`).
SMALL_BACKWARD = {1: 196, 2: 1 << 30}
# With at most this many output columns, rows of pixels are too short for the native convolutions with stride 2.
NARROW = 4

_every_mode: ContextVar[bool] = ContextVar("every_mode", default=False)


def training_conv(x: Array, kernel: Array, stride: int = 1, groups: int = 1, dilation: int = 1) -> Array:
    """Compute the same as `xla_conv`, with a gradient that is fast on CPUs.

    Differentiable any number of times in reverse mode, and in forward mode inside `differentiable_in_every_mode`.
    """
    if _every_mode.get() or explicitly_sharded(x, kernel):
        return xla_conv(x, kernel, stride=stride, groups=groups, dilation=dilation)
    # Outside the custom gradient, so that a kernel shared by all devices gets the sum of their gradients.
    axes = varying_axes(x, kernel)
    x, kernel = varying_over(axes, x), varying_over(axes, kernel)
    together = groups_per_vector(groups, kernel.shape[2])
    if together == 1:
        return _training_conv(x, kernel, stride, groups, dilation)

    def merged(x: Array, kernel: Array) -> Array:
        dense = merged_groups(kernel, groups, together)
        return xla_conv(x, dense, stride=stride, groups=groups // together, dilation=dilation)

    # For smaller groups than its vectors, a TPU's compiler keeps groups in arrays that are mostly padding, and copies
    # activations in float32: B1g4's step moves 1.7 times the data. The products with zeros only fill the vectors.
    return lax.platform_dependent(
        x, kernel, tpu=merged, default=lambda x, kernel: _training_conv(x, kernel, stride, groups, dilation)
    )


@contextmanager
def differentiable_in_every_mode() -> Iterator[None]:
    """Compute the training form with XLA's convolutions, which also support forward-mode differentiation.

    Use it for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and `jax.hessian` of a model with `train=True`. By default, the
    library uses custom gradients, which are faster on CPUs, and JAX supports custom rules for only one mode: forward
    mode fails with "can't apply forward-mode autodiff (jvp) to a custom_vjp function".

    The context takes effect while a function is traced: a jitted function that was already called outside it is not
    traced again.
    """
    token = _every_mode.set(True)
    try:
        yield
    finally:
        _every_mode.reset(token)


def every_mode() -> bool:
    """Return whether `differentiable_in_every_mode` is active."""
    return _every_mode.get()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _training_conv(x: Array, kernel: Array, stride: int, groups: int, dilation: int) -> Any:
    tile = _native_tile(x, kernel, stride, groups, dilation)
    if tile is None:
        return deploy_conv(x, kernel, stride, groups, dilation)
    xla = functools.partial(xla_conv, stride=stride, groups=groups, dilation=dilation)
    return on_cpu(lambda x, kernel: native_training.conv(x, kernel, stride, groups, tile), xla, x, kernel)


def _forward(x: Array, kernel: Array, stride: int, groups: int, dilation: int) -> tuple[Array, tuple[Array, Array]]:
    return _training_conv(x, kernel, stride, groups, dilation), (x, kernel)


def _backward(
    stride: int, groups: int, dilation: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    xla = functools.partial(xla_conv, stride=stride, groups=groups, dilation=dilation)
    to_kernels = functools.partial(_kernel_gradient, size=kernel.shape[0], stride=stride, dilation=dilation)
    tile = _native_tile(x, kernel, stride, groups, dilation)

    def natively(x: Array, kernel: Array, gradient: Array) -> tuple[Any, Any]:
        assert tile is not None
        size = (x.shape[1], x.shape[2])
        to_input = native_training.input_gradient(gradient, kernel, size, stride, groups, tile)
        return to_input, native_training.kernel_gradient(x, gradient, stride, groups, tile)

    def products(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        to_kernel = by_group(to_kernels, groups, x, gradient)
        if out_pixels(x, stride) <= SMALL_BACKWARD[stride] or kernel.shape[0] == 1:
            return _input_gradients(x, kernel, gradient, stride, groups, dilation), to_kernel
        return jax.vjp(lambda x: xla(x, kernel), x)[1](gradient)[0], to_kernel

    def by_xla(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(xla, x, kernel)[1](gradient)

    return on_cpu(products if tile is None else natively, by_xla, x, kernel, gradient)


_training_conv.defvjp(_forward, _backward)


@jax.custom_jvp
def materialize(x: Array) -> Array:
    """Return `x`, and on CPUs make XLA compute it only once, however many operations read it.

    XLA's CPU backend duplicates elementwise work into every consumer. In a stack of training blocks, the identity
    branch chains one block's sum to the next, so the last block of a stage would recompute all earlier ones for each of
    its consumers: ten times the compilation time, and a third more running time (A0 at 32x32). XLA drops
    `lax.optimization_barrier` before fusion, but it cannot see through a loop that never runs.
    """
    if x.size == 0 or explicitly_sharded(x):
        return x
    return on_cpu(_never_looping, lambda x: x, x)


def _never_looping(x: Array) -> Array:
    # min(x, 0) > 0 is false for every number and for NaN.
    return lax.while_loop(lambda x: jnp.minimum(x.reshape(-1)[0], 0) > 0, lambda x: x + x, x)


@materialize.defjvp
def _materialize_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return materialize(*primals), tangents[0]


def _native_tile(x: Array, kernel: Array, stride: int, groups: int, dilation: int) -> int | None:
    """Return Winograd's m, or 0 for the direct sum; None if the native convolution is not to be used."""
    suits = kernel.shape[0] == 3 and x.size > 0
    large = out_pixels(x, 1) > SMALL_FORWARD[1] if stride == 1 else -(-x.shape[2] // 2) > NARROW
    # XLA cannot partition a call over devices under `jit`; in `pmap` and `shard_map`, each device makes its own call.
    divided = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
    # With an accelerator, do not compile C++ that would not be used.
    if divided or not (suits and large and jax.default_backend() == "cpu"):
        return None
    _, height, width, inputs = x.shape
    shape = LayerShape(height, width, inputs, kernel.shape[3], stride, groups, dilation)
    return training_tile(shape, x.shape[0], x.dtype.name)


def training_tile(shape: LayerShape, images: int, dtype: str) -> int | None:
    """Return the tile of the native algorithm with the lowest estimated training time; None if none is available."""
    tiles = [algorithm.tile for algorithm in candidates(shape, dtype) if algorithm.trains]
    return min(tiles, key=lambda tile: native_training_seconds(shape, tile, images), default=None)


def _kernel_gradient(x: Array, gradient: Array, *, size: int, stride: int, dilation: int) -> Array:
    flat = gradient.reshape(-1, gradient.shape[3])
    products = [tap.reshape(-1, tap.shape[3]).T @ flat for tap in taps(x, size, stride, dilation)]
    return jnp.stack(products).reshape(size, size, x.shape[3], gradient.shape[3])


def _input_gradients(x: Array, kernel: Array, gradient: Array, stride: int, groups: int, dilation: int) -> Array:
    parts = zip(*(jnp.split(a, groups, axis=3) for a in (kernel, gradient)), strict=True)
    shape = (*x.shape[:3], x.shape[3] // groups)
    return jnp.concatenate([_input_gradient(shape, k, g, stride, dilation) for k, g in parts], axis=3)


def _input_gradient(shape: tuple[int, ...], kernel: Array, gradient: Array, stride: int, dilation: int) -> Array:
    size, height, width, inputs = kernel.shape[0], *shape[1:]
    rows, columns = gradient.shape[1:3]
    products = gradient @ kernel.reshape(-1, kernel.shape[3]).T
    zero = jnp.zeros((), products.dtype)
    total = None
    for position in range(size * size):
        i, j = divmod(position, size)
        # Tap (i, j) read the rows dilation * (i - size // 2) + stride * r, so its gradient is spread to those rows.
        # Negative edges crop.
        top, left = (dilation * (k - size // 2) for k in (i, j))
        edges = (
            (0, 0, 0),
            (top, height - top - (rows - 1) * stride - 1, stride - 1),
            (left, width - left - (columns - 1) * stride - 1, stride - 1),
            (0, 0, 0),
        )
        spread = lax.pad(products[..., position * inputs : (position + 1) * inputs], zero, edges)
        total = spread if total is None else total + spread
    assert total is not None
    return total
