"""StableHLO files: the whole net as `jax.export` writes it, which runs wherever JAX does, without this package."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax import export as jax_export

from ..files import atomic_path
from ..net.model import RepVGG
from ..preprocess import Preprocessing
from .deploy_net import Check, DeployNet, InputLayout, deploy_net

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    input_layout: InputLayout = "NHWC",
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    check: Check | None = None,
) -> None:
    """Write the deploy form as a file for `jax.export.deserialize`, atomically.

    `jax.export.deserialize(bytearray(file))` gives an object whose `call(images)` takes float32 normalised images
    (`[N, H, W, C]` or `[N, C, H, W]`, any N >= 1) and gives float32 logits `[N, classes]`, on CPU, CUDA and TPU.
    Loading needs jax and flatbuffers, which `jax.export` uses, and nothing else; weights are part of the program.

    Args:
      path: where to write.
      model: training form (fused here) or deploy form, computing in any dtype; the file is float32.
      variables: its variables.
      input_layout: NHWC, as this library computes, or NCHW, transposed once in front.
      image_size: pixels, one number or (height, width); the preprocessing's if None.
      preprocessing: tells the image size; the variant's published evaluation if None.
      check: sees what was written before it is put in place; what it raises leaves nothing behind.

    Raises:
      WeightsError: the variables are not this model's, or have NaN.
      FusionError: a training form that cannot be fused.
      RepVGGError: the file cannot be written.
      ValueError: an unknown layout or a non-positive size.
    """
    net = deploy_net(model, variables, input_layout, image_size, preprocessing)
    serialized = export_program(net).serialize()
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialized)
        if check is not None:
            check(temporary)


def export_program(net: DeployNet) -> jax_export.Exported:
    """Return the net as one program from images to logits, its weights inside, its batch size free."""
    forward = forward_function(net)

    def logits(images: Array) -> Array:
        return forward(net.params, images)

    logits.__name__ = net.model.variant.name  # what `Exported.fun_name` tells whoever loads it
    (batch,) = jax_export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, *net.image_shape), jnp.float32)
    return jax_export.export(jax.jit(logits), platforms=PLATFORMS)(images)


def forward_function(net: DeployNet) -> Callable[[Mapping[str, Any], Array], Array]:
    """Return `forward(params, images) -> logits`, for images that lie as the net's `input_layout` says."""

    def forward(params: Mapping[str, Any], images: Array) -> Array:
        if net.input_layout == "NCHW":
            images = jnp.transpose(images, (0, 2, 3, 1))
        logits = net.model.apply({"params": params}, images)
        assert isinstance(logits, jax.Array)
        return logits

    return forward
