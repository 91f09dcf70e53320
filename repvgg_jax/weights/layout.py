"""What a RepVGG's parameter tree must contain, and the check that a loaded one does."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..errors import WeightsError
from ..model import RepVGG
from ..variants import Variant

FlatArrays = Mapping[str, Any]
"""`{"params/stage0/rbr_dense/conv/kernel": array, …}`: a variables tree with `/`-joined names."""


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`{"params": {…}, "batch_stats": {…}}` as one level of `/`-joined names."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(arrays: FlatArrays) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(arrays, sep="/")


@functools.lru_cache(maxsize=32)
def expected_shapes(variant: Variant, deploy: bool, num_classes: int, in_channels: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every leaf of that model's variables."""
    model = RepVGG(variant, num_classes, deploy)
    images = jax.ShapeDtypeStruct((1, 32, 32, in_channels), jnp.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), images)
    return {name: leaf.shape for name, leaf in flatten(tree).items()}


def check_arrays(arrays: FlatArrays, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Hold `arrays` to the names and shapes of `expected`; nothing is ever partly loaded in silence.

    Raises:
      WeightsError: lists missing, unexpected and mis-shaped entries (the first ten of each kind, then a count),
        or names an entry with NaN or infinite values.
    """
    problems = []
    missing = [name for name in expected if name not in arrays]
    unexpected = [name for name in arrays if name not in expected]
    wrong = [
        f"{name} is {list(arrays[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != tuple(shape)
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if names:
            problems.append(f"{what}: {first_ten(names)}")
    if problems:
        raise WeightsError(f"{where} does not fit the model; {'; '.join(problems)}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WeightsError(f"{where}: {name} has NaN or infinite values")


def first_ten(names: Iterable[str]) -> str:
    """The first ten names and how many follow."""
    names = list(names)
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
