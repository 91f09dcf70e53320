"""Export to StableHLO files with `jax.export`. They run wherever JAX does, without this package."""

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

    `jax.export.deserialize(bytearray(file))` returns an object whose `call(images)` takes float32 normalised images
    (`[N, H, W, C]` or `[N, C, H, W]`, any N >= 1) and returns float32 logits `[N, classes]`, on CPU, CUDA and TPU.
    Loading needs only jax and flatbuffers, which `jax.export` uses. The weights are part of the program.

    Args:
      path: file to write.
      model: training form (fused here) or deploy form, with any computation dtype; the file is float32.
      variables: variables of `model`.
      input_layout: NHWC, the layout in which this library computes, or NCHW, which is transposed once at the input.
      image_size: size in pixels, one number or (height, width); that of `preprocessing` if None.
      preprocessing: provides the image size; the variant's published evaluation preprocessing if None.
      check: called with the written file before it is put in place. If it raises, no file is left.

    Raises:
      WeightsError: the variables do not belong to this model, or contain NaN.
      FusionError: the training form cannot be fused.
      RepVGGError: the file cannot be written.
      ValueError: the layout is unknown, or a size is not positive.
    """
    net = deploy_net(model, variables, input_layout, image_size, preprocessing)
    serialized = export_program(net).serialize()
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialized)
        if check is not None:
            check(temporary)


def export_program(net: DeployNet) -> jax_export.Exported:
    """Return the net as one program from images to logits, with its weights and a dynamic batch size."""
    forward = forward_function(net)

    def logits(images: Array) -> Array:
        return forward(net.params, images)

    logits.__name__ = net.model.variant.name  # becomes `Exported.fun_name` in the loaded file
    (batch,) = jax_export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, *net.image_shape), jnp.float32)
    return jax_export.export(jax.jit(logits), platforms=PLATFORMS)(images)


def forward_function(net: DeployNet) -> Callable[[Mapping[str, Any], Array], Array]:
    """Return `forward(params, images) -> logits` for images in the net's `input_layout`."""

    def forward(params: Mapping[str, Any], images: Array) -> Array:
        if net.input_layout == "NCHW":
            images = jnp.transpose(images, (0, 2, 3, 1))
        logits = net.model.apply({"params": params}, images)
        assert isinstance(logits, jax.Array)
        return logits

    return forward
