"""Computation of a deploy-form net according to a `Plan`: preparing the parameters, forward pass, compilation."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental.layout import Format, Layout

from ..broadcasting import channelwise
from ..conv.algorithm import ALGORITHMS
from ..conv.deploy import convolve, prepare_kernel
from ..conv.native import ends
from ..net.activations import activation_function
from ..net.blocks import SqueezeExcite
from ..net.model import RepVGG, global_average_pool
from ..net.walk import walk_block
from .plan import LayerPlan, Plan, StagePlan

Output = Literal["logits", "embedding"]
"""Output of a predictor: class scores, or the pooled features that feed the classifier (`RepVGG.embed`)."""

CPU_OPTIONS: dict[str, Any] = {
    # Use Eigen's matrix products. YNNPACK, XLA's default, packs the operands each time: too costly for small products.
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": 512,
}


GRAPH_OPTIONS: dict[str, Any] = {
    # Use cuDNN graphs, which XLA records in a CUDA graph: one launch for the net instead of one per layer. On an H100,
    # one image takes 0.6 times as long, and 128 images take 1.05 times as long.
    "xla_gpu_experimental_enable_conv_fusion": True,
}


def prepare_params(params: Mapping[str, Any], plan: Plan, dtype: Any) -> dict[str, Any]:
    """Return deploy-form parameters, with each kernel transformed for its algorithm and the body in `dtype`.

    Args:
      params: `{block: {"rbr_reparam": {kernel, bias}, …}, "linear": …}`.
      plan: plan that chooses each block's algorithm.
      dtype: computation dtype of the body; head parameters keep theirs.
    """
    linear = params["linear"]
    if _ends_natively(plan) and linear["kernel"].dtype == jnp.float32:
        linear = ends.pack_classifier(np.asarray(linear["kernel"]), np.asarray(linear["bias"]))
    ready: dict[str, Any] = {"linear": jax.tree.map(jnp.asarray, linear)}
    for stage in plan.stages:
        for layer in stage.layers:
            block = params[layer.name]
            kernel, bias = (block["rbr_reparam"][leaf] for leaf in ("kernel", "bias"))
            if layer.algorithm != "direct":
                kernel = prepare_kernel(np.asarray(kernel), layer.algorithm, groups=layer.shape.groups)
            gate = {name: leaf for name, leaf in block.items() if name != "rbr_reparam"}
            # The native convolutions add the bias to float32 sums.
            bias = jnp.asarray(bias, jnp.float32 if ALGORITHMS[layer.algorithm].is_native else dtype)
            ready[layer.name] = {"kernel": jnp.asarray(kernel, dtype), "bias": bias} | jax.tree.map(jnp.asarray, gate)
    return ready


def planned_forward(
    model: RepVGG, plan: Plan, output: Output = "logits"
) -> Callable[[Mapping[str, Any], Array], Array]:
    """Return the function `forward(params, images) -> [batch_size, outputs]`, ready for `jax.jit`.

    `forward` takes parameters from `prepare_params`, and normalised images `[batch_size, H, W, C]`.
    """

    def run_stage(params: Mapping[str, Any], stage: StagePlan, x: Array) -> Array:
        for layer in stage.layers:
            x = walk_block(model.variant, PlannedOperations(model, params), layer, x)
        return x

    def stem_to_output(params: Mapping[str, Any], images: Array) -> Array:
        x = images.astype(model.dtype)
        for stage in plan.stages:
            x = _in_portions(lambda part, stage=stage: run_stage(params, stage, part), x, stage.portion)
        if _ends_natively(plan) and model.param_dtype == jnp.float32:
            pooled = ends.average(x)
        else:
            pooled = global_average_pool(x, model.param_dtype)
        if output == "embedding":
            return pooled
        linear = params["linear"]
        if "packed" in linear:
            return ends.classify(pooled, linear["packed"], linear["padded_bias"], model.num_classes)
        return pooled @ linear["kernel"] + channelwise(linear["bias"], pooled.ndim)

    def forward(params: Mapping[str, Any], images: Array) -> Array:
        blank = -plan.batch_size % plan.outer
        if blank:
            images = jnp.pad(images, ((0, blank), (0, 0), (0, 0), (0, 0)))
        return _in_portions(lambda part: stem_to_output(params, part), images, plan.outer)[: plan.batch_size]

    return forward


def _ends_natively(plan: Plan) -> bool:
    """Return whether the last convolution is native, so that what follows it can be, too."""
    return ALGORITHMS[plan.stages[-1].layers[-1].algorithm].is_native


def _in_portions(function: Callable[[Array], Array], x: Array, portion: int) -> Array:
    """Return `function(x)`, computed on `portion` entries of the first axis at a time."""
    if portion >= len(x):
        return function(x)
    parts = lax.map(function, x.reshape(-1, portion, *x.shape[1:]))
    return parts.reshape(-1, *parts.shape[2:])


@dataclasses.dataclass(frozen=True)
class PlannedOperations:
    """Operations for `walk_block` on prepared parameters."""

    model: RepVGG
    params: Mapping[str, Any]

    def conv(self, block: LayerPlan, x: Array, *, activate: bool) -> Array:
        """Compute the convolution with the planned algorithm, which can include a ReLU."""
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
        """Apply the squeeze-and-excite gate as `DeployBlock` does."""
        model = self.model
        gate = SqueezeExcite(model.variant.squeeze_width(block.shape.out_channels), model.dtype, model.param_dtype)
        gated = gate.apply({"params": self.params[block.name][name]}, x)
        assert isinstance(gated, jax.Array)
        return gated

    def activation(self, block: LayerPlan, x: Array) -> Array:
        """Apply the variant's activation function."""
        del block
        return activation_function(self.model.variant.activation)(x)


def compile_net(platform: str, forward: Callable[..., Any], params: Any, batch: Any) -> tuple[jax.stages.Compiled, Any]:
    """Compile `forward(params, batch)`; return it with the parameters in the layout that the compiled code expects.

    On accelerators the compiler chooses the memory layout of the parameters. cuDNN needs kernels as O, H, W, I.
    Otherwise every call would transpose all kernels, which is half of the memory traffic for one image. For a GPU, a
    bfloat16 net is compiled in two ways, and the faster result is kept.

    Args:
      platform: "cpu", "gpu", …
      forward: function to compile.
      params: its parameters, as arrays.
      batch: its input as a `jax.ShapeDtypeStruct`, in the default layout.
    """
    if platform == "cpu":
        return compile_for_cpu(forward, params, batch), params
    with jax.disable_jit(False):  # ahead-of-time compilation needs jit
        lowered = accelerated(forward).lower(params, batch)
        candidates = [lowered.compile()]
        if platform == "gpu" and any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params)):
            candidates += filter(None, [_compile_with(lowered, GRAPH_OPTIONS)])
        ready = [(compiled, jax.device_put(params, compiled.input_formats[0][0])) for compiled in candidates]
        return ready[fastest(ready, batch)] if len(ready) > 1 else ready[0]


def fastest(candidates: Sequence[tuple[jax.stages.Compiled, Any]], batch: Any) -> int:
    """Return the index of the fastest compiled net, timed over consecutive calls.

    Args:
      candidates: pairs of a compiled net and its parameters.
      batch: the nets' input as a `jax.ShapeDtypeStruct`.
    """
    images = jnp.ones(batch.shape, batch.dtype)

    def seconds(candidate: tuple[jax.stages.Compiled, Any], calls: int) -> float:
        compiled, params = candidate
        begin = time.perf_counter()
        jax.block_until_ready([compiled(params, images) for _ in range(calls)])
        return time.perf_counter() - begin

    # The first call loads the program, and the second may record a CUDA graph.
    calls = [max(1, min(100, int(0.02 / min(seconds(candidate, 1) for _ in range(3))))) for candidate in candidates]
    times = [
        min(seconds(candidate, count) for _ in range(3)) / count
        for candidate, count in zip(candidates, calls, strict=True)
    ]
    return int(np.argmin(times))


def accelerated(forward: Callable[..., Any], device: Any = None) -> Any:
    """Return `forward(params, batch)` jitted for an accelerator; the compiler chooses the layout of the parameters.

    For cross-compilation, `device` may be one that this machine does not have.
    """
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    return jax.jit(forward, in_shardings=(Format(Layout.AUTO, sharding), sharding))


def compile_for_cpu(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compile a function ahead of time with this library's options for CPUs.

    Args:
      function: function to compile.
      *arguments: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
    """
    with jax.disable_jit(False):
        lowered = jax.jit(function).lower(*arguments)
    return _compile_with(lowered, CPU_OPTIONS) or lowered.compile()


def _compile_with(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled | None:
    """Compile with XLA options; return None if this jaxlib does not have one of them."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
    return None
