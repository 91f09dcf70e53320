"""Claim: a predictor gives the model's logits, for any number of images, with any plan, from any thread."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.conv import bf16, native
from repvgg_jax.conv.algorithm import ALGORITHMS
from repvgg_jax.conv.cost import LayerShape
from repvgg_jax.inference import plan_cache
from repvgg_jax.inference.plan import Plan, StagePlan, default_plan
from repvgg_jax.inference.planned_net import compile_net, fastest
from repvgg_jax.inference.predictor import Predictor, planned_net
from repvgg_jax.machine import cache_folder
from repvgg_jax.preprocess import normalize
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables

SMALL = rv.Variant((1, 2, 2, 1), (8, 8, 12, 16, 24))
GROUPED = dataclasses.replace(SMALL, groups=2)
GATED = dataclasses.replace(SMALL, squeeze_excite="before_relu", squeeze_excite_ratio=4)
GATED_AFTER = dataclasses.replace(SMALL, squeeze_excite="after_relu", squeeze_excite_ratio=4, auxiliary_heads=True)


def case(variant, images: int, size: int = 40):
    model = rv.create_model(variant, 5)
    rng = np.random.default_rng(0)
    return model, random_variables(model), rng.normal(size=(images, size, size, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def empty_plan_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("variant", [SMALL, GROUPED, GATED, GATED_AFTER], ids=["plain", "grouped", "se", "post_se"])
def test_logits_are_the_models_for_any_number_of_images(variant):
    model, variables, images = case(variant, 7)
    predict = rv.make_predictor(model, variables, batch_size=3, image_size=40)
    expected = jax.jit(model.apply)(variables, images)
    for count in (1, 2, 3, 7):
        actual = predict(images[:count])
        assert actual.shape == (count, 5)
        assert actual.dtype == np.float32
        assert relative_difference(expected[:count], actual) <= 1e-5
    deployed = rv.make_predictor(*rv.to_deploy(model, variables), batch_size=3, image_size=40)
    np.testing.assert_array_equal(deployed(images), predict(images))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_in_a_plan_gives_the_same_logits(algorithm):
    if not ALGORITHMS[algorithm].takes(LayerShape(8, 8, 16, 16)):
        pytest.skip("not available on this machine")
    model, variables, images = case(GROUPED, 4)
    model, variables = rv.to_deploy(model, variables)
    start = default_plan(model.variant, 4, (40, 40))

    dtype = "float32" if ALGORITHMS[algorithm].refusal("float32", 1) is None else "bfloat16"

    def chosen(layer):
        refusal = ALGORITHMS[algorithm].refusal(dtype, layer.shape.stride)
        return dataclasses.replace(layer, algorithm="direct" if refusal else algorithm)

    stages = tuple(StagePlan(2, tuple(map(chosen, stage.layers))) for stage in start.stages)
    net = planned_net(model.clone(dtype=jnp.dtype(dtype)), variables["params"], Plan(4, 4, stages, "test"))
    difference = relative_difference(jax.jit(model.apply)(variables, images), Predictor(net)(images))
    assert difference <= {"float32": 1e-5, "bfloat16": 2e-2}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B1g4"])
def test_the_default_plans_error_over_the_whole_net_is_that_of_float32(name):
    model = rv.create_model(name)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3))
    predict = rv.make_predictor(model, variables, batch_size=2)
    with jax.enable_x64(True):
        exact = rv.create_model(name, dtype=jnp.float64, param_dtype=jnp.float64)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        expected = np.asarray(jax.jit(exact.apply)(wide, images))
    assert relative_difference(expected, predict(images.astype(np.float32))) <= 1e-5


def test_uint8_images_are_normalised_by_the_predictor():
    model, variables, _ = case(SMALL, 1)
    preprocessing = rv.Preprocessing(40, 1.0, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    folded = rv.make_predictor(model, variables, 2, 40, preprocessing=preprocessing)
    plain = rv.make_predictor(model, variables, 2, 40)
    assert relative_difference(plain(normalize(images, preprocessing)), folded(images)) <= 1e-6
    with pytest.raises(ValueError, match="normalises uint8 images itself; these are float32"):
        folded(images.astype(np.float32))
    with pytest.raises(ValueError, match="images are uint8: normalise them"):
        plain(images)


def test_bfloat16_is_close_and_logits_stay_float32():
    model, variables, images = case(SMALL, 2)
    logits = rv.make_predictor(model, variables, 2, 40, dtype=jnp.bfloat16)(images)
    assert logits.dtype == np.float32
    difference = relative_difference(model.apply(variables, images), logits)
    assert 1e-5 < difference < 0.05


def test_without_bfloat16_products_it_is_float32_with_rounded_weights(monkeypatch):
    model, variables, images = case(SMALL, 2)
    model, variables = rv.to_deploy(model, variables)
    monkeypatch.setattr(bf16, "pays_on_cpu", lambda: False)
    predict = rv.make_predictor(model, variables, 2, 40, dtype=jnp.bfloat16)

    def rounded(leaf):
        return jnp.asarray(leaf, jnp.bfloat16).astype(jnp.float32)

    params = {
        name: block if name == "linear" else jax.tree.map(rounded, block) for name, block in variables["params"].items()
    }
    expected = rv.make_predictor(model, {"params": params}, 2, 40)
    assert str(predict.plan) == str(expected.plan)
    np.testing.assert_array_equal(predict(images), expected(images))


@pytest.mark.parametrize("faster", ["native_bf16_winograd2", "native_winograd4"])
def test_without_tiles_the_faster_of_bfloat16_and_float32_computes_a_bfloat16_net(faster, monkeypatch):
    monkeypatch.setattr(native, "bf16_available", lambda: True)
    monkeypatch.setattr(native, "bf16_in_tiles", lambda: False)
    monkeypatch.setattr(bf16, "_seconds", lambda name: 1.0 if name == faster else 2.0)
    assert bf16.pays_on_cpu.__wrapped__() == (faster == "native_bf16_winograd2")


def test_a_bfloat16_net_is_computed_as_the_timed_layer_was_faster():
    model, variables, _ = case(SMALL, 1)
    predict = rv.make_predictor(model, variables, 1, 40, dtype=jnp.bfloat16)
    assert predict.plan is not None
    in_bfloat16 = [name.startswith("native_bf16") for name in predict.plan.algorithms().values()]
    assert set(in_bfloat16) == {bf16.pays_on_cpu()}


def test_threads_share_a_predictor():
    model, variables, images = case(SMALL, 16)
    predict = rv.make_predictor(model, variables, 2, 40)
    expected = [predict(image[None]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda image: predict(image[None]), images))
    np.testing.assert_array_equal(actual, expected)


def test_invalid_input_is_named():
    model, variables, images = case(SMALL, 1)
    predict = rv.make_predictor(model, variables, 2, 40)
    for bad in (images[0], images[:, :39], images[:0]):
        with pytest.raises(ValueError, match=r"images must have shape \[N, 40, 40, 3\], not "):
            predict(bad)
    with pytest.raises(ValueError, match=r"not \[0, 40, 40, 3\]; the batch is empty"):
        predict(images[:0])
    with pytest.raises(ValueError, match="must be positive"):
        rv.make_predictor(model, variables, 0, 40)
    with pytest.raises(ValueError, match="takes 3 channels, the preprocessing gives 1"):
        rv.make_predictor(model, variables, 1, 40, preprocessing=rv.Preprocessing(40, 1.0, (0.5,), (0.5,)))


def test_the_plan_prints_as_a_table():
    model, variables, _ = case(SMALL, 1)
    lines = str(rv.make_predictor(model, variables, 2, 40).plan).splitlines()
    blocks = [line.split()[0] for line in lines if line.startswith("stage")]
    assert blocks == [block.name for block in SMALL.blocks()]


def test_a_measured_plan_is_cached_and_a_damaged_one_ignored():
    model, variables, images = case(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8)), 1, size=16)
    measured = rv.make_predictor(model, variables, 1, 16, tune=True).plan
    assert measured is not None
    assert measured.source == "measured"
    second = rv.make_predictor(model, variables, 1, 16, tune=True)
    assert second.plan is not None
    assert second.plan.source == "cached measurement"
    assert second.plan.algorithms() == measured.algorithms()
    assert relative_difference(model.apply(variables, images), second(images)) <= 1e-5

    (file,) = cache_folder("plans").glob("*.json")
    sound = json.loads(file.read_text(encoding="utf-8"))
    for damage in ("{", "[]", json.dumps(sound | {"portions": ["x"]}), json.dumps(sound | {"algorithms": {}})):
        file.write_text(damage, encoding="utf-8")
        assert plan_cache.load_plan(measured, "float32") is None
    file.write_text(json.dumps(sound | {"key": sound["key"] | {"jax": "0.0.1"}}), encoding="utf-8")
    assert plan_cache.load_plan(measured, "float32") is None


def test_an_accelerators_compiler_chooses_the_layout_of_parameters():
    """The GPU code path, with the CPU's compiler: parameters have the layouts that the compiled program asks for."""
    model, variables, images = case(GROUPED, 2)
    deploy, variables = rv.to_deploy(model, variables)
    compiled, params = compile_net("gpu", deploy.apply, variables, jax.ShapeDtypeStruct(images.shape, images.dtype))
    assert jax.tree.map(lambda leaf: leaf.format.layout, params) == jax.tree.map(
        lambda form: form.layout, compiled.input_formats[0][0]
    )
    expected = jax.jit(deploy.apply)(variables, images)
    np.testing.assert_allclose(compiled(params, images), expected, rtol=1e-5, atol=1e-5)


def test_on_a_gpu_a_bfloat16_net_is_compiled_in_two_ways_and_the_faster_is_kept():
    """The GPU code path, with the CPU's compiler, and the choice between two programs, one of them clearly slower."""
    model, variables, images = case(GROUPED, 2)
    deploy, variables = rv.to_deploy(model, variables)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    batch = jax.ShapeDtypeStruct(images.shape, images.dtype)
    compiled, params = compile_net("gpu", deploy.apply, half, batch)
    np.testing.assert_allclose(compiled(params, images), jax.jit(deploy.apply)(half, images), rtol=1e-2, atol=1e-2)

    def slow(matrix, images):
        return jax.lax.fori_loop(0, 1000, lambda _, x: jnp.tanh(x @ matrix), images)

    matrix, rows = jnp.eye(64), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    programs = [
        (jax.jit(run).lower(matrix, rows).compile(), matrix) for run in (slow, lambda matrix, images: images @ matrix)
    ]
    batch = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert fastest(programs, batch) == 1
    assert fastest(programs[::-1], batch) == 0
