"""Helpers of the quantisation tests: small nets with outlier channels, and images to calibrate them with."""

from typing import Any

import numpy as np

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables

SIZE = 32
VARIANTS = {
    "plain": rv.Variant((1, 2, 1, 1), (16, 16, 24, 32, 40)),
    "grouped": rv.Variant((1, 2, 1, 1), (16, 16, 24, 32, 40), groups=4),
    "SE before ReLU": rv.Variant((1, 2, 1, 1), (16, 16, 24, 32, 40), squeeze_excite="before_relu"),
    "SE after ReLU": rv.Variant((1, 2, 1, 1), (16, 16, 24, 32, 40), squeeze_excite="after_relu"),
}


def images(count: int = 16, seed: int = 0) -> np.ndarray:
    """Return noise with enough spatial correlation that some of it passes through a deep net."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, SIZE // 4, SIZE // 4, 3))
    return (coarse.repeat(4, 1).repeat(4, 2) + 0.3 * rng.normal(size=(count, SIZE, SIZE, 3))).astype(np.float32)


def deploy_net(name: str = "plain", num_classes: int = 10, seed: int = 0) -> tuple[rv.RepVGG, dict[str, Any]]:
    """Return a fused net with outlier channels."""
    model = rv.create_model(VARIANTS[name], num_classes, deploy=True)
    return model, spread_channels(model, random_variables(model, seed), seed)


def spread_channels(model: rv.RepVGG, variables: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Return the same function, the channels between layers scaled by random factors: no weight range fits them all."""
    from repvgg_jax.quantization.equalize import pairs

    rng = np.random.default_rng(seed)
    params = {
        name: {key: dict(tree) if isinstance(tree, dict) else tree for key, tree in block.items()}
        for name, block in variables["params"].items()
    }
    for writer, reader, groups in pairs(model.variant):
        source = params[writer]["rbr_reparam"]
        target = params[reader] if reader == "linear" else params[reader]["rbr_reparam"]
        factors = np.exp(rng.normal(0, 1.5, source["bias"].shape)).astype(np.float32)
        source["kernel"], source["bias"] = source["kernel"] * factors, source["bias"] * factors
        for gate in {"se", "post_se"} & params[writer].keys():
            down = params[writer][gate]["down"]
            params[writer][gate]["down"] = down | {"kernel": down["kernel"] / factors[:, None]}
        kernel = np.array(target["kernel"])
        outputs = kernel.shape[-1] // groups
        per_group = kernel.shape[-2]
        for group in range(groups):
            rows = factors[group * per_group : (group + 1) * per_group, None]
            kernel[..., group * outputs : (group + 1) * outputs] /= rows
        target["kernel"] = kernel
    return {"params": params}
