"""Deploy inference: fused, compiled ahead of time, called with arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .fusion import to_deploy
from .model import RepVGG


def make_predictor(
    model: RepVGG,
    variables: Mapping[str, Any],
    batch_size: int = 1,
    image_size: int | tuple[int, int] | None = None,
) -> Callable[[Any], np.ndarray]:
    """A function from normalised images to logits: the fused net, compiled once for one shape.

    Args:
      model: training form (fused here) or deploy form.
      variables: its variables.
      batch_size: the compiled batch; smaller ones are padded, larger ones run in pieces.
      image_size: pixels, one number or (height, width); the variant's published size if None.

    Returns:
      `predict(images)`, `[N, H, W, C]` float -> `[N, num_classes]` float32, for any N >= 1.

    Raises:
      ValueError: a non-positive size; later, from `predict`, images of another shape.
    """
    if image_size is None:
        image_size = model.variant.image_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(batch_size, height, width) < 1:
        raise ValueError(f"batch_size and image_size must be positive, not {batch_size} and {image_size}")
    if not model.deploy:
        model, variables = to_deploy(model, variables)
    variables = jax.tree.map(jnp.asarray, {"params": variables["params"]})
    channels = variables["params"]["stage0"]["rbr_reparam"]["kernel"].shape[2]
    shape = (height, width, channels)

    def forward(variables, images):
        return model.apply(variables, images)

    batch = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    compiled = jax.jit(forward).lower(variables, batch).compile()

    def predict(images: Any) -> np.ndarray:
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[1:] != shape or not len(images):
            raise ValueError(f"images must have shape [N, {height}, {width}, {channels}], not {list(images.shape)}")
        pieces = []
        for start in range(0, len(images), batch_size):
            piece = images[start : start + batch_size]
            padded = np.pad(piece, ((0, batch_size - len(piece)), (0, 0), (0, 0), (0, 0)))
            pieces.append(np.asarray(compiled(variables, padded))[: len(piece)])
        return np.concatenate(pieces)

    return predict
