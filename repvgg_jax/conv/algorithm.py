"""Algorithms for deploy-form 3x3 convolutions, one record each.

Cost of a layer with `P` output pixels (over the batch), in multiplications and in float32 numbers that pass through
memory besides input, kernel and output:

| algorithm | multiplications | numbers written and read again |
|---|---|---|
| direct | 9 `P` `C_in` `C_out` / groups | none (XLA's convolution packs on the fly) |
| im2col | the same, as one matrix product | 9 `P` `C_in` |
| winograd2 | 4 `P` `C_in` `C_out` / groups | 4 `P` (`C_in` + `C_out`), see `winograd` |
| winograd4 | 2.25 `P` `C_in` `C_out` / groups | about 4 `P` (`C_in` + `C_out`) |
| native | as direct | one copy of the input, in the cache |
| native_winograd2, native_winograd4 | as winograd2, winograd4 | none: tiles stay in the cache |
| native_bf16 | as direct, in bfloat16 | as native, half as many bytes |
| native_bf16_winograd2 | as winograd2, in bfloat16, with float32 transforms | none: tiles stay in the cache |

The native algorithms are C++ for CPUs and need a compiler (`native`); the others are XLA operations. Which one is
fastest depends on layer, batch and machine: `inference.plan` chooses.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp

from ..broadcasting import channelwise
from . import native
from .cost import LayerShape, im2col_seconds, native_seconds, winograd_seconds, xla_seconds
from .winograd import transform_kernel, winograd
from .xla import taps, xla_conv


class Options(NamedTuple):
    """Parameters of one convolution, besides its algorithm."""

    stride: int
    groups: int
    dilation: int
    relu: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm for 3x3 convolutions with bias and optional ReLU.

    Attributes:
      name: name in plans and plan files.
      prepare: function `(kernel [3, 3, C_in // groups, C_out], groups)` that returns the kernel in the layout that
        `compute` needs; called once, ahead of time.
      compute: function `(x [N, H, W, C_in], prepared kernel, bias [C_out], options)`.
      seconds: function `(shape, portion)` that estimates the seconds per image of a layer that computes `portion`
        images at a time.
      strides: supported strides.
      dilated: whether dilation is supported.
      dtypes: supported dtypes; None for all.
      tile: Winograd's m, or 0.
      is_native: whether it is written in C++.
      trains: whether its gradients are in C++ too (`native.training`).
      takes: function `(shape)` that returns whether this machine can run the algorithm for that layer.
    """

    name: str
    prepare: Callable[[np.ndarray, int], np.ndarray]
    compute: Callable[[Array, Array, Array, Options], Array]
    seconds: Callable[[LayerShape, int], float]
    strides: tuple[int, ...] = (1, 2)
    dilated: bool = False
    dtypes: tuple[str, ...] | None = ("float32", "float64")
    tile: int = 0
    is_native: bool = False
    trains: bool = False
    takes: Callable[[LayerShape], bool] = lambda shape: True

    def refusal(self, dtype: str, stride: int, dilation: int = 1) -> str | None:
        """Return why this algorithm does not support the dtype, stride or dilation; None if it supports them."""
        if stride not in self.strides:
            return f"{self.name} needs stride {' or '.join(map(str, self.strides))}, not {stride}"
        if dilation != 1 and not self.dilated:
            return f"{self.name} needs dilation 1, not {dilation}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"{self.name} computes in {' or '.join(self.dtypes)}, not {dtype}"
        return None


def candidates(shape: LayerShape, dtype: str) -> list[Algorithm]:
    """Return the algorithms that can compute a layer on this machine's CPU."""
    return [
        algorithm
        for algorithm in ALGORITHMS.values()
        if algorithm.refusal(dtype, shape.stride, shape.dilation) is None and algorithm.takes(shape)
    ]


def _direct() -> Algorithm:
    def compute(x: Array, kernel: Array, bias: Array, options: Options) -> Array:
        y = xla_conv(x, kernel, stride=options.stride, groups=options.groups, dilation=options.dilation)
        return _finished(y, bias, options)

    return Algorithm(
        name="direct",
        prepare=lambda kernel, groups: kernel,
        compute=compute,
        seconds=xla_seconds,
        dilated=True,
        dtypes=None,
    )


def _im2col() -> Algorithm:
    def prepare(kernel: np.ndarray, groups: int) -> np.ndarray:
        """Return the kernel as `[groups, 9 * C_in // groups, C_out // groups]`."""
        return np.stack([part.reshape(-1, part.shape[3]) for part in np.split(kernel, groups, axis=3)])

    def compute(x: Array, kernel: Array, bias: Array, options: Options) -> Array:
        columns, inner = taps(x, 3, options.stride, options.dilation), x.shape[3] // options.groups
        parts = []
        for group, matrix in enumerate(kernel):
            share = [tap[..., group * inner : (group + 1) * inner] for tap in columns]
            parts.append(jnp.concatenate(share, axis=3).reshape(-1, 9 * inner) @ matrix)
        return _finished(jnp.concatenate(parts, axis=1).reshape(*columns[0].shape[:3], -1), bias, options)

    return Algorithm(name="im2col", prepare=prepare, compute=compute, seconds=im2col_seconds)


def _winograd(tile: int) -> Algorithm:
    return Algorithm(
        name=f"winograd{tile}",
        prepare=lambda kernel, groups: _matrices(kernel, groups, tile),
        compute=lambda x, kernel, bias, options: winograd(
            x, kernel, bias, tile=tile, groups=options.groups, relu=options.relu
        ),
        seconds=lambda shape, portion: winograd_seconds(shape, tile, portion),
        strides=(1,),
        tile=tile,
    )


def _native(tile: int) -> Algorithm:
    return Algorithm(
        name=f"native_winograd{tile}" if tile else "native",
        prepare=lambda kernel, groups: native.pack_kernel(_matrices(kernel, groups, tile)),
        compute=lambda x, packed, bias, options: native.convolve(
            x, packed, bias, tile=tile, stride=options.stride, groups=options.groups, relu=options.relu
        ),
        seconds=lambda shape, portion: native_seconds(shape, tile, portion),
        strides=(1,) if tile else (1, 2),
        dtypes=("float32",),
        tile=tile,
        is_native=True,
        trains=True,
        takes=lambda shape: native.available(),
    )


def _native_bf16(tile: int) -> Algorithm:
    def prepare(kernel: np.ndarray, groups: int) -> np.ndarray:
        if tile:
            return native.pack_bf16_matrices(_matrices(kernel, groups, tile))
        return native.pack_bf16_kernel(kernel, groups)

    def takes(shape: LayerShape) -> bool:
        if tile:  # AMX computes the direct sum faster
            return native.bf16_available() and not native.bf16_in_tiles()
        return native.bf16_available() and native.supports_bf16(shape.in_channels, shape.groups)

    return Algorithm(
        name=f"native_bf16_winograd{tile}" if tile else "native_bf16",
        prepare=prepare,
        compute=lambda x, packed, bias, options: native.convolve_bf16(
            x, packed, bias, tile=tile, stride=options.stride, groups=options.groups, relu=options.relu
        ),
        seconds=lambda shape, portion: native_seconds(shape, tile, portion),
        strides=(1,) if tile else (1, 2),
        dtypes=("bfloat16",),
        tile=tile,
        is_native=True,
        takes=takes,
    )


def _matrices(kernel: np.ndarray, groups: int, tile: int) -> np.ndarray:
    """Return the kernel's matrices, for the positions of a Winograd tile or the 9 taps.

    Their shape is `[groups, positions, C_in // groups, C_out // groups]`.
    """
    parts = np.split(kernel, groups, axis=3)
    return np.stack([transform_kernel(part, tile) if tile else part.reshape(9, *part.shape[2:]) for part in parts])


def _finished(y: Array, bias: Array, options: Options) -> Array:
    y = y + channelwise(bias)
    return jnp.maximum(y, 0) if options.relu else y


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        *(_direct(), _im2col(), _winograd(2), _winograd(4)),
        *(_native(0), _native(2), _native(4), _native_bf16(0), _native_bf16(2)),
    )
}
"""Algorithms by name. If two have the same estimate, the first is chosen."""
