"""Quantised nets in `.safetensors` files: int8 weights with their scales, a quarter of the size of a float file."""

import os
from pathlib import Path

import jax
import numpy as np

from ..errors import WeightsError
from ..net.variants import Variant
from ..weights import native, quantized_tensors
from ..weights.header import INT8, Header
from ..weights.loading import open_weights
from .net import QuantizedNet


def save_quantized(path: str | os.PathLike, net: QuantizedNet) -> None:
    """Write a quantised net to a self-describing `.safetensors` file, atomically.

    Args:
      path: file to write.
      net: net from `quantize` or `load_quantized`.

    Raises:
      WeightsError: the suffix is not .safetensors.
      RepVGGError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"cannot write {path}: quantised nets are .safetensors files")
    arrays = jax.tree.map(np.asarray, net.variables)
    header = Header(INT8, net.variant, net.num_classes, net.preprocessing, net.class_names)
    native.write(path, header, arrays)


def load_quantized(path: str | os.PathLike, name: str | Variant | None = None) -> QuantizedNet:
    """Load a quantised net from a file.

    Args:
      path: file written by `save_quantized` or `python -m convert --int8`.
      name: expected variant, as in `load_weights`.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the file is unreadable, contains float weights, or is of another variant.
    """
    with open_weights(path, name, headless=True) as contents:
        info = contents.info
        if not info.quantized:
            raise WeightsError(
                f"{path} holds {info.dtype} weights, not a quantised net; make one with python -m convert --int8"
            )
        params = quantized_tensors.read_tensors(contents.file, f"{path}")
    return QuantizedNet(info.variant, info.num_classes, info.in_channels, params, info.preprocessing, info.class_names)
