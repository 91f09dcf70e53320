"""Inference with a quantised net, called like any predictor."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..planned_net import compile_for
from ..predictor import Predictor
from ..preprocess import Preprocessing, normalize
from .net import QuantizedNet


class QuantizedPredictor(Predictor):
    """A compiled quantised net; see `Predictor`. It has no plan: every layer is XLA's convolution.

    The integers are held in float32, exactly: XLA has no fast integer convolution on CPUs. Where 8 bits should buy
    speed, export the net (`export_quantized_onnx`) for a runtime with integer kernels.
    """

    def __init__(
        self,
        net: QuantizedNet,
        batch_size: int,
        image_size: tuple[int, int],
        preprocessing: Preprocessing | None,
    ):
        self.batch_size = batch_size
        self.image_shape = (*image_size, net.in_channels)
        self.image_dtype = np.dtype(np.float32 if preprocessing is None else np.uint8)
        self._params = jax.tree.map(jnp.asarray, dict(net.params))

        def run(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
            if preprocessing is not None:
                images = normalize(images, preprocessing)
            return net.apply({"params": params}, images)

        batch = jax.ShapeDtypeStruct((batch_size, *self.image_shape), self.image_dtype)
        self._compiled = compile_for(jax.default_backend(), run, self._params, batch)
