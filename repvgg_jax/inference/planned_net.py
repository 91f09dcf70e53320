"""A deploy-form net computed as a `Plan` says: its parameters made ready, its forward pass, its compilation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental.layout import Format, Layout

from ..broadcasting import channelwise
from ..conv.deploy import convolve, prepare_kernel
from ..net.activations import activation_function
from ..net.blocks import SqueezeExcite
from ..net.model import RepVGG, global_average_pool
from ..net.walk import walk_block
from .plan import LayerPlan, Plan, StagePlan

Output = Literal["logits", "embedding"]
"""What a predictor returns: class scores, or the pooled features that the classifier would read (`RepVGG.embed`)."""

CPU_OPTIONS: dict[str, Any] = {
    # Eigen's matrix products: YNNPACK, XLA's default, packs anew each time, which small products do not repay.
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": 512,
}


def prepare_params(params: Mapping[str, Any], plan: Plan, dtype: Any) -> dict[str, Any]:
    """Deploy-form parameters with every kernel made ready for its algorithm, the body in `dtype`.

    Args:
      params: `{block: {"rbr_reparam": {kernel, bias}, …}, "linear": …}`.
      plan: names each block's algorithm.
      dtype: computation dtype of the body; head parameters keep theirs.
    """
    ready: dict[str, Any] = {"linear": jax.tree.map(jnp.asarray, params["linear"])}
    for stage in plan.stages:
        for layer in stage.layers:
            block = params[layer.name]
            kernel, bias = (block["rbr_reparam"][leaf] for leaf in ("kernel", "bias"))
            if layer.algorithm != "direct":
                kernel = prepare_kernel(np.asarray(kernel), layer.algorithm, groups=layer.shape.groups)
            gate = {name: leaf for name, leaf in block.items() if name != "rbr_reparam"}
            cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), {"kernel": kernel, "bias": bias})
            ready[layer.name] = cast | jax.tree.map(jnp.asarray, gate)
    return ready


def planned_forward(
    model: RepVGG, plan: Plan, output: Output = "logits"
) -> Callable[[Mapping[str, Any], Array], Array]:
    """`forward(prepared params, images [batch_size, H, W, C] normalised) -> [batch_size, outputs]`, to be jitted."""

    def run_stage(params: Mapping[str, Any], stage: StagePlan, x: Array) -> Array:
        for layer in stage.layers:
            x = walk_block(model.variant, PlannedOperations(model, params), layer, x)
        return x

    def stem_to_output(params: Mapping[str, Any], images: Array) -> Array:
        x = images
        for stage in plan.stages:
            x = _in_portions(lambda part, stage=stage: run_stage(params, stage, part), x, stage.portion)
        pooled = global_average_pool(x, model.param_dtype)
        if output == "embedding":
            return pooled
        return pooled @ params["linear"]["kernel"] + channelwise(params["linear"]["bias"], pooled.ndim)

    def forward(params: Mapping[str, Any], images: Array) -> Array:
        images = images.astype(model.dtype)
        blank = -plan.batch_size % plan.outer
        if blank:
            images = jnp.pad(images, ((0, blank), (0, 0), (0, 0), (0, 0)))
        return _in_portions(lambda part: stem_to_output(params, part), images, plan.outer)[: plan.batch_size]

    return forward


def _in_portions(function: Callable[[Array], Array], x: Array, portion: int) -> Array:
    """`function(x)`, `portion` entries of the first axis at a time."""
    if portion >= len(x):
        return function(x)
    parts = lax.map(function, x.reshape(-1, portion, *x.shape[1:]))
    return parts.reshape(-1, *parts.shape[2:])


@dataclasses.dataclass(frozen=True)
class PlannedOperations:
    """What `walk_block` asks for, on prepared parameters."""

    model: RepVGG
    params: Mapping[str, Any]

    def conv(self, block: LayerPlan, x: Array, *, activate: bool) -> Array:
        """Compute by the planned algorithm, which can take a ReLU along."""
        relu = activate and self.model.variant.activation == "relu"
        x = convolve(
            x,
            self.params[block.name]["kernel"],
            self.params[block.name]["bias"],
            algorithm=block.algorithm,
            stride=block.shape.stride,
            groups=block.shape.groups,
            dilation=block.shape.dilation,
            relu=relu,
        )
        return self.activation(block, x) if activate and not relu else x

    def gate(self, block: LayerPlan, name: str, x: Array) -> Array:
        """Compute as `DeployBlock` does."""
        model = self.model
        gate = SqueezeExcite(model.variant.squeeze_width(block.shape.out_channels), model.dtype, model.param_dtype)
        gated = gate.apply({"params": self.params[block.name][name]}, x)
        assert isinstance(gated, jax.Array)
        return gated

    def activation(self, block: LayerPlan, x: Array) -> Array:
        """Apply the variant's."""
        del block
        return activation_function(self.model.variant.activation)(x)


def compile_net(platform: str, forward: Callable[..., Any], params: Any, batch: Any) -> tuple[jax.stages.Compiled, Any]:
    """Return `forward(params, batch)` compiled, and the parameters as the compiled code wants them.

    On accelerators the compiler chooses how parameters lie in memory: cuDNN wants kernels as O, H, W, I and would have
    each of them transposed in every call, which takes half of the memory traffic of one image.

    Args:
      platform: "cpu", "gpu", …
      forward: what to compile.
      params: arrays.
      batch: a `jax.ShapeDtypeStruct`, in the layout of arrays everywhere.
    """
    if platform == "cpu":
        return compile_for_cpu(forward, params, batch), params
    with jax.disable_jit(False):  # nothing is compiled ahead of time otherwise
        compiled = accelerated(forward).lower(params, batch).compile()
    return compiled, jax.device_put(params, compiled.input_formats[0][0])


def accelerated(forward: Callable[..., Any], device: Any = None) -> Any:
    """Return `forward(params, batch)` jitted for an accelerator, its parameters as the compiler wants them.

    `device` may be one that is not here, to be compiled for.
    """
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    return jax.jit(forward, in_shardings=(Format(Layout.AUTO, sharding), sharding))


def compile_for_cpu(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """`jit` ahead of time with this library's options for CPUs.

    Args:
      function: what to compile.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    with jax.disable_jit(False):
        lowered = jax.jit(function).lower(*arguments)
    try:
        return lowered.compile(compiler_options=CPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:  # another jaxlib may not know an option
        if "compile option" not in str(error):
            raise
    return lowered.compile()
