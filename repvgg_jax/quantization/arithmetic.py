"""Arithmetic of quantised nets: by XLA, or by native code with packed kernels."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from ..broadcasting import channelwise
from ..conv import native
from ..conv.native import ends
from ..conv.xla import DIMENSION_NUMBERS
from ..net.variants import BlockSpec, Variant
from .calibration import input_dtype
from .quantizer import SIGNED, to_integers
from .stack import LINEAR, geometry, linear_map, with_readers

SHIFT = 128
"""Offset between int8 and uint8."""


def is_quantized(layer: Mapping[str, Any]) -> bool:
    """Return whether a layer of `QuantizedNet.params` is quantised."""
    return "kernel_scale" in layer


class Arithmetic(Protocol):
    """Implementation of a quantised net's operations. All implementations give the same integers."""

    def to_integers(self, x: Array, scale: Array, dtype: Any) -> Array:
        """Return the integers of a layer's input, as `totals` and `rounded` take them."""
        ...

    def mean(self, x: Array, scale: Array) -> Array:
        """Return the real-valued spatial means `[N, C]` of integers, from an exact sum."""
        ...

    def logits(self, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the real-valued result of the quantised classifier on uint8 `[N, C]`."""
        ...

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the accumulators, including the bias, of uint8 or int8 `x`: int32, or the same integers in float32."""
        ...

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Return `totals` times `factor` (`[O]`), rounded and saturated to uint8."""
        ...


@dataclasses.dataclass(frozen=True)
class InXla:
    """XLA's convolutions, in integers or in floats that hold the integers."""

    integer: bool

    def to_integers(self, x: Array, scale: Array, dtype: Any) -> Array:
        """Return `x / scale` in integers; see `quantizer.to_integers`."""
        return to_integers(x, scale, dtype)

    def mean(self, x: Array, scale: Array) -> Array:
        """Return the means of integers, summed in float32, which holds them."""
        return x.astype(jnp.float32).sum((1, 2)) * (scale / (x.shape[1] * x.shape[2]))

    def logits(self, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the rescaled accumulators; see `accumulate`."""
        total = accumulate(None, x, layer, self.integer).astype(jnp.float32)
        return total * channelwise(layer["input_scale"] * layer["kernel_scale"], total.ndim)

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the accumulators; see `accumulate`."""
        return accumulate(spec, x, layer, self.integer)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Return the rescaled accumulators, rounded in float32 with ties to even."""
        return _saturate(self.totals(spec, x, layer).astype(jnp.float32) * channelwise(factor))


def accumulate(spec: BlockSpec | None, x: Array, layer: Mapping[str, Any], integer: bool) -> Array:
    """Return a layer's accumulators, including the bias: int32, or the same integers in float32.

    Args:
      spec: the block; None for the classifier.
      x: uint8 or int8 `[N, H, W, C]` or `[N, C]`.
      layer: the quantised layer.
      integer: compute int8 x int8 -> int32. Unsigned inputs are then shifted by 128, which is compensated in the bias
        by the sum of the weights.
    """
    kernel, bias = layer["kernel"], layer["bias"]
    if not integer:
        products = linear_map(geometry(spec), x.astype(jnp.float32), kernel.astype(jnp.float32))
        return products + channelwise(bias.astype(jnp.float32), products.ndim)
    shift = SHIFT if x.dtype == jnp.uint8 else 0
    signed = (x.astype(jnp.int32) - shift).astype(jnp.int8)
    if shift:
        bias = bias + shift * kernel.astype(jnp.int32).sum(tuple(range(kernel.ndim - 1)))
    bias = channelwise(bias, x.ndim)
    if spec is None:
        return lax.dot(signed, kernel, preferred_element_type=jnp.int32) + bias
    padding = spec.dilation * (kernel.shape[0] // 2)
    # Padding is with real zeros, which the shift turns into -128.
    signed = lax.pad(signed, jnp.int8(-shift), ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)))
    in_integers = _convolution(spec, jnp.int8, jnp.int32)
    in_floats = _convolution(spec, jnp.float32, jnp.float32)  # XLA has no int8 -> int32 convolution for GPUs
    return bias + lax.platform_dependent(signed, kernel, cuda=in_floats, rocm=in_floats, default=in_integers)


def _convolution(spec: BlockSpec, inputs: Any, sums: Any) -> Callable[[Array, Array], Array]:
    """Return a convolution of padded int8 `[N, H, W, C]` with int8 kernels to int32, computed in the given dtypes.

    float32 at full precision gives the same integers, exact up to 2^24.
    """

    def convolve(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x.astype(inputs),
            kernel.astype(inputs),
            (spec.stride, spec.stride),
            "VALID",
            rhs_dilation=(spec.dilation, spec.dilation),
            dimension_numbers=DIMENSION_NUMBERS,
            feature_group_count=spec.groups,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=sums,
        ).astype(jnp.int32)

    return convolve


def _saturate(x: Array) -> Array:
    """Return `x` rounded and saturated to uint8."""
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def pack_layers(variant: Variant, params: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """Return `QuantizedNet.params` with packed kernels in the layers that the native code supports.

    The kernel of another quantised classifier becomes float32, the dtype in which XLA computes its product.
    """
    packed = dict(params)
    for spec, following in with_readers(variant.blocks(in_channels)):
        takes = spec.dilation == 1 and native.supports_int8(spec.in_channels, spec.groups)
        if takes and is_quantized(params[spec.name]):
            packed[spec.name] = pack_layer(spec, params[spec.name], params.get(following, {}).get("input_scale", 1))
    if is_quantized(params[LINEAR]):
        packed[LINEAR] = _pack_classifier(params[LINEAR])
    return packed


def _pack_classifier(layer: Mapping[str, Any]) -> dict[str, Any]:
    kernel, scale = np.asarray(layer["kernel"]), np.asarray(layer["kernel_scale"], np.float32)
    if len(kernel) % ends.INT8_INPUTS:
        return dict(layer) | {"kernel": kernel.astype(np.float32)}
    return {
        "input_scale": layer["input_scale"],
        "kernel_scale": scale,
        "packed": ends.pack_int8_classifier(kernel),
        "padded_bias": native.pad_channels(np.asarray(layer["bias"]), 1),
        "padded_factor": native.pad_channels(np.float32(layer["input_scale"]) * scale, 1),
    }


def pack_layer(spec: BlockSpec, layer: Mapping[str, Any], next_scale: Any) -> dict[str, Any]:
    """Return a quantised layer packed for the native convolution; `next_scale` is the next layer's input scale."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    if spec.name == "stage0":  # its int8 image is shifted to uint8, which the bias compensates
        bias = bias - SHIFT * kernel.astype(np.int32).sum((0, 1, 2))
    unit = np.float32(layer["input_scale"]) * np.asarray(layer["kernel_scale"], np.float32)
    return {name: leaf for name, leaf in layer.items() if name not in ("kernel", "bias")} | {
        "packed": native.pack_int8_kernel(kernel, spec.groups),
        "padded_bias": native.pad_channels(bias, spec.groups),
        "padded_factor": native.pad_channels(unit / np.float32(next_scale), spec.groups),
    }


class NativeIntegers:
    """`Arithmetic` in C++, on parameters from `pack_layers`; unpacked layers run on XLA.

    int8 is shifted to uint8 as soon as it is rounded, since the products take unsigned pixels.
    """

    _other = InXla(integer=False)

    def to_integers(self, x: Array, scale: Array, dtype: Any) -> Array:
        """Return `x / scale` in integers, shifted to uint8."""
        return ends.round_to_bytes(x, 1 / scale, SHIFT if dtype == SIGNED else 0)

    def mean(self, x: Array, scale: Array) -> Array:
        """Return the means of uint8."""
        return ends.average(x, scale)

    def logits(self, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the logits; from exact sums if the layer is packed."""
        if "packed" not in layer:
            return self._other.logits(x, layer)
        classes = len(layer["kernel_scale"])
        return ends.classify_int8(x, layer["packed"], layer["padded_bias"], layer["padded_factor"], classes)

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the accumulators; int32 from packed layers."""
        return _convolve(spec, x, layer, jnp.int32) if "packed" in layer else self._other.totals(spec, x, layer)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Return the rescaled accumulators as uint8; packed layers use the factor from `pack_layer`."""
        if "packed" not in layer:
            return self._other.rounded(spec, x, layer, factor)
        return _convolve(spec, x, layer, jnp.uint8)


def _convolve(spec: BlockSpec, x: Array, layer: Mapping[str, Any], dtype: Any) -> Array:
    return native.convolve_int8(
        x,
        layer["packed"],
        layer["padded_bias"],
        layer["padded_factor"],
        outputs=spec.out_channels,
        stride=spec.stride,
        groups=spec.groups,
        zero=SHIFT if input_dtype(spec.name) == SIGNED else 0,
        dtype=dtype,
    )
