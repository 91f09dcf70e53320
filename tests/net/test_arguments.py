"""Claim: invalid arguments get one sentence that names the value, not a traceback from deep inside."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small")
OTHERS = {
    "deeper": dataclasses.replace(SMALL, num_blocks=(1, 2, 1, 1)),
    "wider": dataclasses.replace(SMALL, widths=(4, 4, 8, 8, 8)),
    "with gates": dataclasses.replace(SMALL, squeeze_excite="before_relu"),
}
IMAGES = np.zeros((2, 16, 16, 3), np.float32)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value).split("\n-----")[0]  # then JAX's note on hidden frames
    assert "\n" not in message
    assert isinstance(error.value, rv.RepVGGError | ValueError)
    return message


@pytest.mark.parametrize("other", OTHERS)
def test_variables_of_another_net_are_refused(other, tmp_path):
    model, strange = rv.create_model(SMALL, 5), rv.create_model(OTHERS[other], 5)
    variables = random_variables(strange)
    deployed = rv.fuse_variables(variables)
    attempts: dict[str, Any] = {
        "to_deploy": lambda: rv.to_deploy(model, variables),
        "predictor": lambda: rv.make_predictor(model, variables, 1, 16),
        "deploy predictor": lambda: rv.make_predictor(model.clone(deploy=True), deployed, 1, 16),
        "training form": lambda: rv.make_predictor(model.clone(deploy=True), variables, 1, 16),
        "save": lambda: rv.save_weights(tmp_path / "w.safetensors", model, variables),
        "save deploy": lambda: rv.save_weights(tmp_path / "w.pth", model.clone(deploy=True), deployed),
        "traced": lambda: jax.eval_shape(lambda tree: rv.to_deploy(model, tree)[1], variables),
    }
    for name, attempt in attempts.items():
        with pytest.raises((rv.WeightsError, rv.FusionError)) as error:
            attempt()
        assert "does not fit" in one_sentence(error), name
        assert "params/stage" in str(error.value), name
    assert not list(tmp_path.iterdir())


def test_another_class_count_and_missing_variables_are_refused(tmp_path):
    model = rv.create_model(SMALL, 5)
    variables = random_variables(rv.create_model(SMALL, 7))
    for attempt in (rv.to_deploy, lambda *net: rv.save_weights(tmp_path / "w.safetensors", *net)):
        with pytest.raises(rv.WeightsError, match=r"linear/kernel is \[8, 7\], not \[8, 5\]"):
            attempt(model, variables)
    with pytest.raises(rv.WeightsError, match="missing: params/stage0"):
        rv.make_predictor(model.clone(deploy=True), {}, 1, 16)
    with pytest.raises(rv.FusionError, match="expected variables with 'params', found nothing"):
        rv.make_predictor(model, {}, 1, 16)


def test_statistics_of_another_net_are_refused():
    variables = random_variables(rv.create_model(SMALL, 5))
    others = random_variables(rv.create_model(OTHERS["wider"], 5))
    with pytest.raises(rv.FusionError) as error:
        rv.fuse_variables({"params": variables["params"], "batch_stats": others["batch_stats"]})
    assert "stage2_0: no running statistics" in one_sentence(error)
    assert "of the same net" in str(error.value)


def test_a_string_as_a_path_of_names_is_refused():
    variables = random_variables(rv.create_model(SMALL, 5))
    inside = {kind: {"backbone": tree} for kind, tree in variables.items()}
    with pytest.raises(rv.FusionError, match=r'must be a tuple of names, such as \("backbone",\), not \'backbone\''):
        rv.fuse_variables(inside, "backbone")
    assert "rbr_reparam" in rv.fuse_variables(inside, ["backbone"])["params"]["backbone"]["stage0"]


@pytest.mark.parametrize("count", ["10", 10.5, 10.0, True, None, [10]])
def test_class_counts_that_are_not_whole_numbers_are_refused(count, tmp_path):
    with pytest.raises(ValueError, match="num_classes must be a whole number, not ") as error:
        rv.create_model("RepVGG-A0", count)
    assert repr(count) in one_sentence(error)
    if count is not None:
        with pytest.raises(ValueError, match="num_classes must be a whole number"):
            rv.load_weights(tmp_path / "none.pth", num_classes=count)
    assert rv.create_model("RepVGG-A0", cast(Any, np.int64(10))).num_classes == 10


@pytest.mark.parametrize("dtype", ["foo", "int8", jnp.int32, np.dtype("complex64"), 32])
def test_unsupported_dtypes_are_refused(dtype):
    for option in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"^{option} must be a floating-point dtype") as error:
            rv.create_model("RepVGG-A0", **{option: dtype})
        assert repr(dtype) in one_sentence(error)
    model = rv.create_model(SMALL, 5, deploy=True)
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        rv.make_predictor(model, random_variables(model), 1, 16, dtype=dtype)


def test_dtypes_can_be_given_by_name():
    assert rv.create_model("RepVGG-A0", dtype="bfloat16").dtype == jnp.bfloat16
    assert rv.create_model("RepVGG-A0", dtype="float32") == rv.create_model("RepVGG-A0")


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_images_with_channels_first_are_refused(deploy):
    model = rv.create_model(SMALL, 5, deploy)
    variables = random_variables(model)
    nchw = np.zeros((2, 3, 16, 16), np.float32)
    for attempt in (
        lambda: model.apply(variables, nchw),
        lambda: jax.jit(model.apply)(variables, nchw),
        lambda: model.apply(variables, nchw, method="features"),
        lambda: model.init(jax.random.key(0), nchw),
        lambda: rv.make_predictor(model, variables, 1, 16)(nchw),
    ):
        with pytest.raises(ValueError, match=r"not \[2, 3, 16, 16\]; channels come last: transpose") as error:
            attempt()
        assert "[N, H, W, C]" in one_sentence(error)
    with pytest.raises(ValueError, match=r"must have shape \[N, H, W, 3\], not \[2, 16, 16, 4\]"):
        model.apply(variables, np.zeros((2, 16, 16, 4), np.float32))
    # Another number of channels is allowed, but chosen at init.
    assert jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 5), np.float32))


def test_empty_batches_are_refused_where_they_make_no_sense():
    model = rv.create_model(SMALL, 5)
    variables = random_variables(model)
    with pytest.raises(ValueError, match=r"an empty batch, \[0, 16, 16, 3\], has no statistics"):
        model.apply(variables, IMAGES[:0], train=True, mutable=["batch_stats"])
    assert jax.eval_shape(model.apply, variables, IMAGES[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"not \[0, 16, 16, 3\]"):
        rv.make_predictor(model, variables, 1, 16)(IMAGES[:0])
