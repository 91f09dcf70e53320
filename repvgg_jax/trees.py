"""Flat form of variables trees."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

FlatArrays = Mapping[str, Any]
"""`{"params/stage0/rbr_dense/conv/kernel": array, …}`: a variables tree with `/`-joined names."""


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"params": {…}, "batch_stats": {…}}` as one flat dict with `/`-joined names."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(arrays: FlatArrays) -> dict[str, Any]:
    """Return the nested dict for a flat one: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(arrays, sep="/")
