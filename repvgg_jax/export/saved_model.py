"""Export to TensorFlow's SavedModel through `jax.experimental.jax2tf`."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax

from ..errors import ExportError
from ..files import atomic_folder
from ..net.model import RepVGG
from ..preprocess import Preprocessing
from .deploy_net import INPUT, OUTPUT, Check, InputLayout, deploy_net
from .stablehlo import PLATFORMS, forward_function


def export_saved_model(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    input_layout: InputLayout = "NHWC",
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    check: Check | None = None,
) -> None:
    """Write the deploy form as a SavedModel, a new folder that is created atomically.

    Its signature `serving_default` takes `images` (float32, normalised, `[N, H, W, C]` or `[N, C, H, W]`, any N >= 1)
    and returns `logits` (float32 `[N, classes]`). The weights are `tf.Variable`s.

    Args:
      path: folder to create; it must not exist.
      model: training form (fused here) or deploy form, with any computation dtype; the export is float32.
      variables: variables of `model`.
      input_layout: NHWC, the layout in which this library computes, or NCHW, which is transposed once at the input.
      image_size: size in pixels, one number or (height, width); that of `preprocessing` if None.
      preprocessing: provides the image size; the variant's published evaluation preprocessing if None.
      check: called with the written folder before it is put in place. If it raises, no folder is left.

    Raises:
      ExportError: TensorFlow is not installed, or this jax has no jax2tf.
      WeightsError: the variables do not belong to this model, or contain NaN.
      FusionError: the training form cannot be fused.
      RepVGGError: the folder exists or cannot be written.
      ValueError: the layout is unknown, or a size is not positive.
    """
    check_tensorflow_installed()
    import tensorflow as tf  # pyright: ignore[reportMissingImports]
    from jax.experimental import jax2tf

    net = deploy_net(model, variables, input_layout, image_size, preprocessing)
    forward = forward_function(net)
    converted = jax2tf.convert(
        lambda params, images: {OUTPUT: forward(params, images)},
        polymorphic_shapes=[None, "(N, ...)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module, weights = tf.Module(), jax.tree.map(tf.Variable, net.params)
    setattr(module, "params", weights)  # noqa: B010 (TensorFlow saves attributes, but its type declares none)
    images = tf.TensorSpec([None, *net.image_shape], tf.float32, name=INPUT)
    logits = tf.function(lambda images: converted(weights, images), autograph=False, input_signature=[images])
    with atomic_folder(path) as temporary:
        tf.saved_model.save(module, str(temporary), signatures={"serving_default": logits.get_concrete_function()})
        if check is not None:
            check(temporary)


def check_tensorflow_installed() -> None:
    """Raise ExportError with an installation hint if TensorFlow or jax2tf is missing."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ExportError("writing a SavedModel needs TensorFlow: pip install tensorflow")
    if importlib.util.find_spec("jax.experimental.jax2tf") is None:
        raise ExportError(
            f"writing a SavedModel needs jax.experimental.jax2tf, which jax {jax.__version__} does not have"
        )
