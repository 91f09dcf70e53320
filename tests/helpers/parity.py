"""The same network twice, with the same weights: in PyTorch (the oracle) and in Flax."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import repvgg_jax as rv
from repvgg_jax.net.variants import scaled_widths
from repvgg_jax.trees import flatten
from repvgg_jax.weights.key_maps import AUTHORS, AUTHORS_PLUS
from repvgg_jax.weights.state_dict import Item, items
from tests.helpers import torch_oracle
from tests.helpers.comparison import relative_difference

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}

# 64 x the quarter multipliers are 16, 16, 32, 64, 128 channels. In "grouped", the even blocks 2, 4, 6, 8 include some
# with an identity branch and some without.
_WIDTHS, _MULTIPLIERS = scaled_widths(0.25, 0.25), (0.25, 0.25, 0.25, 0.25)
_MORE, _FEWER = (2, 3, 2, 1), (1, 2, 2, 1)
SMALL: dict[str, tuple[rv.Variant, torch_oracle.Variant]] = {
    "grouped": (rv.Variant(_MORE, _WIDTHS, groups=4), torch_oracle.Variant(_MORE, _MULTIPLIERS, groups=4)),
    "SE before ReLU": (
        rv.Variant(_FEWER, _WIDTHS, squeeze_excite="before_relu"),
        torch_oracle.Variant(_FEWER, _MULTIPLIERS, se="pre"),
    ),
    "plus": (
        rv.Variant(_FEWER, _WIDTHS, squeeze_excite="after_relu", squeeze_excite_ratio=4, auxiliary_heads=True),
        torch_oracle.Variant(_FEWER, _MULTIPLIERS, se="post", plus=True),
    ),
}


def make_oracle(name: str, num_classes: int = 10, in_channels: int = 3, seed: int | None = 0) -> torch_oracle.RepVGG:
    """Return the oracle for a published or small variant, with random weights, none of them at its initial value.

    With `seed=None` it has PyTorch's default initialisation, the same in every process.
    """
    blocks, widths, groups, se, plus = SMALL[name][1] if name in SMALL else torch_oracle.VARIANTS[name]
    kind = torch_oracle.RepVGGplus if plus else torch_oracle.RepVGG
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(blocks, widths, groups, num_classes, False, se, in_channels)
    return model if seed is None else torch_oracle.randomize(model, seed)


def variant_of(name: str) -> rv.Variant:
    return SMALL[name][0] if name in SMALL else rv.create_model(name).variant


def to_flax(oracle: torch_oracle.RepVGG, name: str, folder: Path) -> dict[str, Any]:
    """Return the oracle's weights as float32 variables, by way of a `.pth` file as a user would move them."""
    path = folder / "oracle.pth"
    torch.save(oracle.float().state_dict(), path)
    model, variables = rv.load_weights(path)
    expected = variant_of(name)
    for field in ("num_blocks", "widths", "groups", "squeeze_excite", "auxiliary_heads"):
        assert getattr(model.variant, field) == getattr(expected, field)
    return variables


def flax_model(name: str, dtype: str, num_classes: int = 10, **options: Any) -> rv.RepVGG:
    return rv.create_model(variant_of(name), num_classes, dtype=DTYPES[dtype], param_dtype=DTYPES[dtype], **options)


def compiled(function: Callable, *arguments: Any) -> Callable:
    """Return `jax.jit(function)` for these arguments, with options that halve the time of compilation."""
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": "0"})


def run(function: Callable, *arguments: Any) -> Any:
    """Call a function once, compiled by `compiled`."""
    return compiled(function, *arguments)(*arguments)


def initial_variables(model: rv.RepVGG, seeds: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """Return the result of `model.init` for each seed; the keys are of the kind that compiles fastest."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in seeds]
    init = compiled(lambda key: model.init(key, images), keys[0])
    return [init(key) for key in keys]


def fuse(model: rv.RepVGG, variables: dict[str, Any]) -> tuple[rv.RepVGG, dict[str, Any]]:
    """Return `rv.to_deploy`, compiled as a whole."""
    return model.clone(deploy=True), run(lambda tree: rv.to_deploy(model, tree)[1], variables)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield all equations of a jaxpr, nested ones included; of a choice between platforms, only the default's."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        params = equation.params
        inner = params["branches"][-1:] if equation.primitive.name == "cond" else params.values()
        for value in inner:
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)


def cast(tree: Any, dtype: str) -> Any:
    """Return every leaf in that dtype, as NumPy arrays; exact from float32 to float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def file_items(variant: rv.Variant, num_classes: int, in_channels: int) -> list[Item]:
    """Return the pairs of a key in the authors' state dict and a leaf of the training form."""
    family = AUTHORS_PLUS if variant.auxiliary_heads else AUTHORS
    return items(family, variant, False, num_classes, in_channels)


def leaves_of(oracle: torch_oracle.RepVGG, variant: rv.Variant) -> dict[str, np.ndarray]:
    """Return the oracle's values under our leaves' names and in our layout, in their own dtype (files are float32)."""
    state = oracle.state_dict()
    leaves = {}
    for item in file_items(variant, oracle.config["num_classes"], oracle.config["in_channels"]):
        if item.leaf is not None:
            array = state[item.key].numpy()
            ours = array if item.axes is None else array.transpose(np.argsort(item.axes))
            leaves[item.leaf] = ours.copy()  # training changes the tensor in place
    return leaves


def largest_difference(expected: dict[str, np.ndarray], tree: dict[str, Any], prefix: str = "") -> float:
    """Return the largest relative difference of any leaf whose name starts with `prefix`."""
    leaves = flatten(tree)
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    return max(relative_difference(expected[name], leaves[name]) for name in names)


def nchw(images: np.ndarray, dtype: str = "float32") -> Tensor:
    """Return `[N, H, W, C]` as a tensor in PyTorch's layout."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(dtype)))


def numpy_logits(outputs: Any) -> dict[str, np.ndarray]:
    """Return either library's output, a dict or an array, as a dict of NumPy arrays."""
    outputs = outputs if isinstance(outputs, dict) else {"main": outputs}
    return {
        name: value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in outputs.items()
    }
