"""A quantised net's body on native integer convolutions: its kernels packed, its layers called."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from .. import native
from ..variants import BlockSpec, Variant
from .net import SHIFT, InXla, is_quantized


def pack_layers(variant: Variant, params: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """`QuantizedNet.params` with what the native convolution wants beside the kernels of the layers that it takes."""
    packed = dict(params)
    for spec in variant.blocks(in_channels):
        layer = params[spec.name]
        takes = spec.dilation == 1 and native.supports_int8(spec.in_channels, spec.groups)
        if not is_quantized(layer) or not takes:
            continue
        kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
        if spec.name == "stage0":  # its int8 image is shifted to be unsigned, which the bias takes back
            bias = bias - SHIFT * kernel.astype(np.int32).sum((0, 1, 2))
        rest = {name: leaf for name, leaf in layer.items() if name not in ("kernel", "bias")}
        packed[spec.name] = rest | {
            "packed": native.pack_int8_kernel(kernel, spec.groups),
            "padded_bias": native.pad_channels(bias, spec.groups),
        }
    return packed


class NativeIntegers:
    """`net.Arithmetic` by `native.convolve_int8`, on parameters from `pack_layers`; by XLA where it takes none."""

    _other = InXla(integer=False)

    def totals(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any]) -> Array:
        """int32."""
        if "packed" not in layer:
            return self._other.totals(spec, x, layer)
        return _convolve(spec, x, layer, jnp.ones(spec.out_channels), jnp.int32)

    def rounded(self, spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array) -> Array:
        """uint8."""
        if "packed" not in layer:
            return self._other.rounded(spec, x, layer, factor)
        return _convolve(spec, x, layer, factor, jnp.uint8)


def _convolve(spec: BlockSpec, x: Array, layer: Mapping[str, Any], factor: Array, dtype: Any) -> Array:
    zero = 0
    if x.dtype == jnp.int8:
        zero, x = SHIFT, jax.lax.bitcast_convert_type(x ^ jnp.int8(-SHIFT), jnp.uint8)
    by_group = factor.reshape(spec.groups, -1)
    filled = jnp.pad(by_group, ((0, 0), (0, -by_group.shape[1] % native.lanes()))).reshape(-1)
    return native.convolve_int8(
        x,
        layer["packed"],
        layer["padded_bias"],
        filled,
        outputs=spec.out_channels,
        stride=spec.stride,
        groups=spec.groups,
        zero=zero,
        dtype=dtype,
    )
