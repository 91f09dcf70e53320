"""A quantised net's body on native integer convolutions: its kernels packed, its layers called."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ..conv import native
from ..net.variants import BlockSpec, Variant
from .net import SHIFT, InXla, is_quantized
from .stack import LINEAR, with_readers


def pack_layers(variant: Variant, params: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """`QuantizedNet.params` with what the native convolution wants in place of the kernels of the layers that it takes.

    The classifier's integers become float32, as its product is computed in.
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
    """One quantised layer, for a next one whose input has the scale `next_scale`."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    if spec.name == "stage0":  # its int8 image is shifted to be unsigned, which the bias takes back
        bias = bias - SHIFT * kernel.astype(np.int32).sum((0, 1, 2))
    unit = np.float32(layer["input_scale"]) * np.asarray(layer["kernel_scale"], np.float32)
    return {name: leaf for name, leaf in layer.items() if name not in ("kernel", "bias")} | {
        "packed": native.pack_int8_kernel(kernel, spec.groups),
        "padded_bias": native.pad_channels(bias, spec.groups),
        "padded_factor": native.pad_channels(unit / np.float32(next_scale), spec.groups),
    }


class NativeIntegers:
    """`net.Arithmetic` by `native.convolve_int8`, on parameters from `pack_layers`; by XLA where it takes none."""

    _other = InXla(integer=False)

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """int32."""
        return _convolve(spec, x, layer, jnp.int32) if "packed" in layer else self._other.totals(spec, x, layer)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """uint8; the factor is the one that was packed."""
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
