"""Helpers of the weight-file tests: models small enough to make thousands of, and files of any structure."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.trees import flatten, unflatten
from repvgg_jax.weights.key_maps import FAMILIES, Family
from repvgg_jax.weights.state_dict import items, state_dict

TINY = rv.Variant((2, 2, 2, 1), (8, 8, 12, 16, 20))
CLASSES = 5


def random_arrays(variant: rv.Variant, deploy: bool = False, num_classes: int = CLASSES, seed: int = 0, channels=3):
    """Return a flat tree of random numbers between 0.1 and 1.1, without running the model: fast at any size."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(variant, deploy, num_classes, channels)
    return {name: rng.random(shape, np.float32) + np.float32(0.1) for name, shape in shapes.items()}


def random_model(variant: rv.Variant | str, deploy: bool = False, num_classes: int = CLASSES, seed: int = 0):
    """Return a model and random variables for it."""
    model = rv.create_model(variant, num_classes, deploy)
    return model, unflatten(random_arrays(model.variant, deploy, num_classes, seed))


def torch_state(
    variant: rv.Variant,
    deploy: bool = False,
    family: Family = FAMILIES["authors"],
    seed: int = 0,
    channels: int = 3,
    steps: int = 7,
) -> dict[str, torch.Tensor]:
    """Return a family's state dict with random numbers, as PyTorch tensors."""
    arrays = random_arrays(variant, deploy, seed=seed, channels=channels)
    state = state_dict(family, arrays, variant, deploy, CLASSES, channels, steps)
    return {key: torch.from_numpy(value) for key, value in state.items()}


def file_shapes(family: Family, variant: rv.Variant, deploy: bool, num_classes: int = 10, channels: int = 3):
    """Return the keys and shapes of that model's file."""
    return {item.key: item.file_shape for item in items(family, variant, deploy, num_classes, channels)}


def families_of(variant: rv.Variant) -> list[Family]:
    """Return the families that have names for every part of it."""
    names = ["authors-plus"] if variant.auxiliary_heads else ["authors", "timm", "mmpretrain"]
    return [FAMILIES[name] for name in names]


def assert_same_bits(expected: Any, actual: Any) -> None:
    """Check that two variables trees have the same leaves, bit for bit."""
    expected, actual = flatten(expected), flatten(actual)
    assert set(expected) == set(actual)
    for name, array in expected.items():
        left, right = np.asarray(array), np.asarray(actual[name])
        assert left.dtype == right.dtype, name
        assert left.tobytes() == right.tobytes(), name


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's values as bytes, row-major."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().tobytes() if tensor.dtype == torch.bfloat16 else tensor.numpy().tobytes()


def refused(path: Path | str, **options: Any) -> str:
    """Return the one-line message of the error from loading `path`."""
    with pytest.raises(rv.RepVGGError) as caught:
        rv.load_weights(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def safetensors_bytes(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with that header, preceded by its length or by the false `length`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
