"""Computation of a quantised layer: by XLA, or by native convolutions with packed kernels."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from ..broadcasting import channelwise
from ..conv import native
from ..conv.xla import DIMENSION_NUMBERS
from ..net.variants import BlockSpec, Variant
from .stack import LINEAR, geometry, linear_map, with_readers

SHIFT = 128
"""Offset between int8 and uint8."""


def is_quantized(layer: Mapping[str, Any]) -> bool:
    """Return whether a layer of `QuantizedNet.params` is quantised."""
    return "kernel_scale" in layer


class Arithmetic(Protocol):
    """Computation of the body's quantised layers. All implementations give the same integers."""

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return the convolution of uint8 or int8 `x` plus bias, as int32, or as float32 with the same integers."""
        ...

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Return `totals` times `factor` (`[O]`), rounded and saturated to uint8."""
        ...


@dataclasses.dataclass(frozen=True)
class InXla:
    """XLA's convolutions, on integers or on floats with the same values."""

    integer: bool

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Call `accumulate`."""
        return accumulate(spec, x, layer, self.integer)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Multiply in float32 and round ties to even."""
        return _saturate(self.totals(spec, x, layer).astype(jnp.float32) * channelwise(factor))


def accumulate(spec: BlockSpec | None, x: Array, layer: Mapping[str, Any], integer: bool) -> Array:
    """Return a layer's convolution or matrix product plus bias: int32, or the same integers in float32.

    Args:
      spec: the block; None for the classifier.
      x: uint8 or int8 `[N, H, W, C]` or `[N, C]`.
      layer: the quantised layer.
      integer: compute int8 x int8 -> int32. Unsigned inputs are then shifted by 128, and the bias is corrected by the
        sum of the weights.
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
    # Pad with real zeros, which the shift has turned into -128.
    signed = lax.pad(signed, jnp.int8(-shift), ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)))
    in_integers = _convolution(spec, jnp.int8, jnp.int32)
    in_floats = _convolution(spec, jnp.float32, jnp.float32)  # XLA has no int8 -> int32 convolution for GPUs
    return bias + lax.platform_dependent(signed, kernel, cuda=in_floats, rocm=in_floats, default=in_integers)


def _convolution(spec: BlockSpec, inputs: Any, sums: Any) -> Callable[[Array, Array], Array]:
    """Return a convolution of padded int8 `[N, H, W, C]` with int8 kernels to int32 that computes in these dtypes.

    float32 at full precision gives the same integers, exactly up to 2^24.
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
    """Round to uint8."""
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def pack_layers(variant: Variant, params: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """Return `QuantizedNet.params` with packed kernels for the layers that the native convolution supports.

    The classifier's integers become float32, the dtype in which its product is computed.
    """
    packed = dict(params)
    for spec, following in with_readers(variant.blocks(in_channels)):
        takes = spec.dilation == 1 and native.supports_int8(spec.in_channels, spec.groups)
        if takes and is_quantized(params[spec.name]):
            packed[spec.name] = pack_layer(spec, params[spec.name], params.get(following, {}).get("input_scale", 1))
    if is_quantized(packed[LINEAR]):
        packed[LINEAR] = packed[LINEAR] | {"kernel": np.asarray(packed[LINEAR]["kernel"], np.float32)}
    return packed


def pack_layer(spec: BlockSpec, layer: Mapping[str, Any], next_scale: Any) -> dict[str, Any]:
    """Pack one quantised layer, followed by a layer whose input has the scale `next_scale`."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    if spec.name == "stage0":  # the int8 image is shifted to be unsigned; the bias compensates for that
        bias = bias - SHIFT * kernel.astype(np.int32).sum((0, 1, 2))
    unit = np.float32(layer["input_scale"]) * np.asarray(layer["kernel_scale"], np.float32)
    return {name: leaf for name, leaf in layer.items() if name not in ("kernel", "bias")} | {
        "packed": native.pack_int8_kernel(kernel, spec.groups),
        "padded_bias": native.pad_channels(bias, spec.groups),
        "padded_factor": native.pad_channels(unit / np.float32(next_scale), spec.groups),
    }


class NativeIntegers:
    """`Arithmetic` with `native.convolve_int8` on parameters from `pack_layers`, and XLA for layers not packed."""

    _other = InXla(integer=False)

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """Return int32."""
        return _convolve(spec, x, layer, jnp.int32) if "packed" in layer else self._other.totals(spec, x, layer)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """Return uint8; for a packed layer the factor is the packed one."""
        if "packed" not in layer:
            return self._other.rounded(spec, x, layer, factor)
        return _convolve(spec, x, layer, jnp.uint8)


def _convolve(spec: BlockSpec, x: Array, layer: Mapping[str, Any], dtype: Any) -> Array:
    zero = 0
    if x.dtype == jnp.int8:
        zero, x = SHIFT, jax.lax.bitcast_convert_type(x ^ jnp.int8(-SHIFT), jnp.uint8)
    return native.convolve_int8(
        x,
        layer["packed"],
        layer["padded_bias"],
        layer["padded_factor"],
        outputs=spec.out_channels,
        stride=spec.stride,
        groups=spec.groups,
        zero=zero,
        dtype=dtype,
    )
