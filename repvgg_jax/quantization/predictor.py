"""Inference with a quantised net, called like any predictor."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..conv import native
from ..inference.planned_net import Output, compile_for
from ..inference.predictor import Predictor
from ..preprocess import Preprocessing, normalize
from .native_layers import NativeIntegers, pack_layers
from .net import QuantizedNet, embedding, forward


class QuantizedPredictor(Predictor):
    """A compiled quantised net; see `Predictor`. It has no plan: every layer is computed alike.

    On a CPU with AVX-512 VNNI the body runs on native integer convolutions. Elsewhere its integers are held in float32,
    exactly, since XLA has no fast integer convolution on CPUs: where 8 bits should buy speed there, export the net
    (`export_quantized_onnx`) for a runtime with integer kernels.
    """

    def __init__(
        self,
        net: QuantizedNet,
        batch_size: int,
        image_size: tuple[int, int],
        preprocessing: Preprocessing | None,
        output: Output = "logits",
    ):
        self.output = output
        self.batch_size = batch_size
        self.image_shape = (*image_size, net.in_channels)
        self.image_dtype = np.dtype(np.float32 if preprocessing is None else np.uint8)
        self.integer = jax.default_backend() == "cpu" and native.int8_available()
        params, arithmetic = dict(net.params), None
        if self.integer:
            params, arithmetic = pack_layers(net.variant, params, net.in_channels), NativeIntegers()
        self._params = jax.tree.map(jnp.asarray, params)

        def run(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
            if preprocessing is not None:
                images = normalize(images, preprocessing)
            outputs = forward(net.variant, params, images, integer=False, arithmetic=arithmetic)
            return outputs["logits"] if output == "logits" else embedding(params, outputs)

        batch = jax.ShapeDtypeStruct((batch_size, *self.image_shape), self.image_dtype)
        self._compiled = compile_for(jax.default_backend(), run, self._params, batch)
