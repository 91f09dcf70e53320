"""Claim: the whole library works when JAX is set to raise on implicit promotion, or not to compile anything."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.net.variants import VARIANTS
from repvgg_jax.quantization.qat import quantization_aware, with_ranges
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
NETS = {
    "A0": VARIANTS["RepVGG-A0"],
    "plus": rv.Variant((1, 1, 2, 1), (4, 4, 8, 8, 8), squeeze_excite="after_relu", auxiliary_heads=True),
    "every branch": rv.Variant((1, 2, 1, 1), (8, 8, 8, 8, 8), groups=2, branches=rv.Branches(2, True, True)),
    "dilated QARepVGG": rv.Variant((1, 2, 1, 1), (8, 8, 8, 8, 8), output_stride=8, block="qarepvgg", activation="gelu"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("net", NETS)
def test_nothing_is_promoted_implicitly(net, dtype):
    model = rv.create_model(NETS[net], 5, dtype=dtype)
    images = jax.ShapeDtypeStruct((2, 40, 40, 3), jnp.float32)

    def loss(params, stats, images):
        outputs, changed = model.apply({"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"])
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(outputs)), changed

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32
        fused = jax.eval_shape(lambda tree: rv.to_deploy(model, tree)[1], variables)
        assert jax.eval_shape(model.clone(deploy=True).apply, fused, images).shape == (2, 5)
        jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"], variables["batch_stats"], images)


def test_nothing_is_promoted_implicitly_in_quantisation_aware_training():
    model = rv.create_model(NETS["every branch"], 5)
    start = with_ranges(random_variables(model))
    aware = quantization_aware(model)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):

        def loss(params):
            images = np.ones((2, 40, 40, 3), np.float32)
            logits, changed = aware.apply(start | {"params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.square(logits).sum(), changed

        jax.eval_shape(jax.grad(loss, has_aux=True), start["params"])


@pytest.mark.parametrize(
    ("settings", "extent"),
    [
        pytest.param(STRICT, "some", marks=pytest.mark.slow),
        pytest.param(STRICT, "all", marks=pytest.mark.slow),
        pytest.param({"JAX_DISABLE_JIT": "1"}, "some", marks=pytest.mark.slow),
    ],
    ids=["promotion", "promotion, all", "disable_jit"],
)
def test_a_process_works_with_the_settings_in_its_environment(settings, extent):
    variables = os.environ | settings | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.inference.everything_once", extent]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_predictors_work_where_jit_is_disabled():
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8)), 5, deploy=True)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    expected = rv.make_predictor(model, variables, 2, 16)(images)
    with jax.disable_jit():
        np.testing.assert_array_equal(rv.make_predictor(model, variables, 2, 16)(images), expected)
