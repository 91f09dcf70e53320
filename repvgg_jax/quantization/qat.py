"""Quantisation-aware training: each block trains as the single 8-bit convolution that it becomes.

The parameters are still those of the branches. The forward pass computes their equivalent kernel, fake-quantised with
one scale per output channel, on fake-quantised inputs, so the loss is that of the deployed net. The running BatchNorm
statistics are frozen: the kernel is then a fixed function of the parameters (gammas and betas included), without noise
from batch statistics. Activation ranges are moving averages of the largest value of each batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..broadcasting import channelwise
from ..conv.deploy import deploy_conv
from ..conv.training import materialize, training_conv
from ..errors import QuantizationError
from ..net.blocks import RepVGGBlock
from ..net.fusion import equivalent_kernel_bias, fuse_variables
from ..net.layout import in_channels_of
from ..net.model import Linear, RepVGG
from ..preprocess import Preprocessing
from ..trees import flatten, unflatten
from .calibration import input_dtype
from .net import QuantizedNet, quantize_layer, safe_weight_scale
from .quantizer import fake_quantize_activations, fake_quantize_weights, levels, weight_scale
from .stack import LINEAR, POOL, check_relu, layers_of

RANGE = "input_range"
"""Leaf of `batch_stats` with the moving average of a layer's largest input; 0 before the first batch."""

MOMENTUM = 0.99


def _quantized_input(module: nn.Module, x: Array, dtype: np.dtype) -> Array:
    """Fake-quantise `x` in the module's range, which the first batch sets and later ones update."""
    kept = module.variable("batch_stats", RANGE, jnp.zeros, ())
    if module.is_mutable_collection("batch_stats"):
        largest = jnp.abs(lax.stop_gradient(x)).max().astype(jnp.float32)
        kept.value = jnp.where(kept.value > 0, MOMENTUM * kept.value + (1 - MOMENTUM) * largest, largest)
    scale = jnp.maximum(kept.value / levels(dtype), np.finfo(np.float32).tiny)
    return fake_quantize_activations(x, scale, dtype)


def _quantized_kernel(kernel: Array) -> Array:
    return fake_quantize_weights(kernel, weight_scale(kernel, per_channel=True))


class QuantizedInput(nn.Module):
    """Fake quantisation of the input of a layer without weights: the pool."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _quantized_input(self, x, input_dtype(POOL))


class QATBlock(RepVGGBlock):
    """A training-form block with the usual parameters and statistics that computes its quantised deploy form."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = _quantized_input(self, x, input_dtype(self.name or ""))
        if self.is_initializing():
            return super().__call__(x)
        kernel, bias = equivalent_kernel_bias(
            self.variables["params"], self.variables["batch_stats"], epsilon=self.epsilon
        )
        compute = training_conv if train else deploy_conv
        y = compute(x, _quantized_kernel(kernel), self.stride, self.groups, self.dilation) + channelwise(bias)
        return materialize(self._activate(y))


class QATLinear(Linear):
    """The classifier in 8 bits."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _quantized_input(self, x, input_dtype(LINEAR))
        if self.is_initializing():
            return super().__call__(x)
        params = self.variables["params"]
        return x @ _quantized_kernel(params["kernel"]) + channelwise(params["bias"], x.ndim)


class QATRepVGG(RepVGG):
    """A training form that computes its quantised deploy form. `batch_stats` also contains the activation ranges.

    Auxiliary heads, which are not deployed, stay in float.
    """

    training_block = QATBlock
    classifier = QATLinear

    def setup(self):
        super().setup()
        self.pool = QuantizedInput()

    def _stage_outputs(self, images: Array, train: bool) -> dict[str, Array]:
        outputs = super()._stage_outputs(images, train)
        return outputs | {"stage4": self.pool(outputs["stage4"])}


def quantization_aware(model: RepVGG) -> QATRepVGG:
    """Return the quantisation-aware version of `model`, a training form.

    Raises:
      QuantizationError: the model is in deploy form, its activation is not ReLU, or its dtype is not float32.
    """
    if model.deploy:
        raise QuantizationError("quantisation-aware training needs the training form, not the deploy form")
    check_relu(model.variant)
    if model.dtype != jnp.float32:
        raise QuantizationError(f"quantisation-aware training computes in float32, not {np.dtype(model.dtype).name}")
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(RepVGG)}
    return QATRepVGG(**{name: value for name, value in fields.items() if name not in ("parent", "name")})


def with_ranges(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training form's variables with activation ranges added, to be set by the first batch."""
    names = [name for name in variables["params"] if name.startswith("stage") and not name.endswith("_aux")]
    ranges = {f"batch_stats/{name}/{RANGE}": jnp.zeros(()) for name in (*names, LINEAR, POOL)}
    return unflatten(flatten(variables) | ranges)


def without_ranges(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the plain training form, without activation ranges."""
    return unflatten({name: leaf for name, leaf in flatten(variables).items() if not name.endswith(f"/{RANGE}")})


def quantized_net(
    model: QATRepVGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None = None,
) -> QuantizedNet:
    """Convert a net from quantisation-aware training to integers, without further calibration.

    Args:
      model: the trained model.
      variables: variables of `model`, including activation ranges.
      preprocessing: preprocessing of the images, stored with the net.
      class_names: names by class index.

    Raises:
      QuantizationError: the ranges have not been set by any batch.
    """
    stats, scales = variables["batch_stats"], {}
    for name in (*(spec.name for spec in model.variant.blocks()), LINEAR, POOL):
        largest = float(stats[name][RANGE])
        if largest <= 0:
            raise QuantizationError(f"no training step has set the range of {name}'s input")
        scales[name] = np.float32(largest / levels(input_dtype(name)))
    fused = fuse_variables(without_ranges(variables), epsilon=model.variant.epsilon)
    net: dict[str, Any] = {POOL: {"input_scale": scales[POOL]}}
    for name, layer in layers_of(fused["params"]).items():
        scale = safe_weight_scale(weight_scale(layer["kernel"], per_channel=True), layer["bias"], scales[name])
        net[name] = quantize_layer(layer, np.rint(layer["kernel"] / scale), scale, scales[name])
    return QuantizedNet(
        model.variant, model.num_classes, in_channels_of(flatten(fused)), net, preprocessing, class_names
    )
