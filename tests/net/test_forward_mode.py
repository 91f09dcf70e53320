"""Claim: the training form is differentiable in forward mode too, on request, and the modes agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.conv.training import differentiable_in_every_mode, training_conv
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import run
from tests.helpers.random_weights import random_variables

MODEL = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 4)), 3)
VARIABLES = random_variables(MODEL)
IMAGES = np.random.default_rng(0).normal(size=(4, 20, 24, 3)).astype(np.float32)
DIRECTION = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), VARIABLES)


def loss(params):
    logits, _ = MODEL.apply(VARIABLES | {"params": params}, IMAGES, train=True, mutable=["batch_stats"])
    return jnp.square(logits).mean()


def test_forward_mode_agrees_with_reverse_mode():
    gradient = run(jax.grad(loss), VARIABLES["params"])
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(DIRECTION["params"]), strict=True)
    expected = sum(float((g * d).sum()) for g, d in leaves)
    with differentiable_in_every_mode():
        _, actual = run(lambda p, d: jax.jvp(loss, (p,), (d,)), VARIABLES["params"], DIRECTION["params"])
    assert actual == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 1e-3


@pytest.mark.slow
def test_jacobians_and_hessians_agree_with_reverse_mode():
    """With respect to the stem's BN, whose Hessian is small enough to compare with reverse mode alone."""

    def of_bias(bias):
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: bias if "/".join(k.key for k in path) == "stage0/rbr_dense/bn/bias" else leaf,
            VARIABLES["params"],
        )
        return loss(params)

    bias = jnp.asarray(VARIABLES["params"]["stage0"]["rbr_dense"]["bn"]["bias"])
    with differentiable_in_every_mode():
        hessian, jacobian = run(lambda b: (jax.hessian(of_bias)(b), jax.jacfwd(of_bias)(b)), bias)
    expected = run(lambda b: (jax.jacrev(jax.grad(of_bias))(b), jax.grad(of_bias)(b)), bias)
    assert relative_difference(expected[0], hessian) < 1e-2
    assert relative_difference(expected[1], jacobian) < 1e-3
    assert np.abs(hessian).max() > 1e-4


@pytest.mark.parametrize("size", [1, 3])
def test_a_single_convolution_refuses_forward_mode_by_default(size):
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((size, size, 2, 2))
    with pytest.raises(TypeError, match=r"can't apply forward-mode .* to a custom_vjp function"):
        jax.jvp(training_conv, (x, kernel), (x, kernel))
    with differentiable_in_every_mode():
        y, tangent = jax.jvp(training_conv, (x, kernel), (x, kernel))
    np.testing.assert_allclose(tangent, 2 * y)  # bilinear


def test_evaluation_and_deploy_forms_need_no_request():
    for model, variables in ((MODEL, VARIABLES), rv.to_deploy(MODEL, VARIABLES)):
        tangents = jax.tree.map(jnp.ones_like, variables["params"])

        def logits(params, model=model, variables=variables):
            return model.apply(variables | {"params": params}, IMAGES)

        jax.eval_shape(lambda p, t, f=logits: jax.jvp(f, (p,), (t,)), variables["params"], tangents)
