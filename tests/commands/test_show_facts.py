"""Claim: what the page of `show` says about a net is true."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.net.summary import summarize
from repvgg_jax.preprocess import eval_transform, normalize
from repvgg_jax.show.collect import stage_costs
from repvgg_jax.show.comparison import difference
from repvgg_jax.show.facts import Spread
from repvgg_jax.show.page import page
from tests.helpers.commands import command
from tests.helpers.outlier_nets import deploy_net, images
from tests.helpers.photos import PHOTO
from tests.helpers.shown_nets import (
    ODD,
    PLAIN,
    SIZE,
    VARIANTS,
    Page,
    check_page_of,
    check_self_contained,
    facts_of,
    write_net,
)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A training-form file."""
    return write_net(tmp_path / "small.safetensors", PLAIN)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Five photographs in two folders."""
    files = [tmp_path / "photos" / name for name in ("a/1.png", "a/2.jpg", "b/1.png", "b/2.png", "b/3.png")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.crop((40 * number, 20 * number, 40 * number + 90, 20 * number + 60)).save(file)
    return files


@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "gates after ReLU, auxiliary heads", "QARepVGG"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "gates before ReLU", "GELU")),
    ],
)
def test_every_kind_of_net_is_shown_layer_by_layer_with_its_own_ranges(name, photos, tmp_path):
    """Weights are compared with `to_deploy`'s, activations with the training form's features."""
    weights = write_net(tmp_path / "net.safetensors", VARIANTS[name])
    facts = facts_of(weights, *photos)
    (tmp_path / "net.html").write_text(page(facts), encoding="utf-8")
    check_page_of(VARIANTS[name], Page(tmp_path / "net.html"), len(photos))
    model, variables = rv.load_weights(weights)
    _, fused = rv.to_deploy(model, variables)
    assert [layer.name for layer in facts.weights] == [b.name for b in model.variant.blocks()] + ["linear"]
    for layer in facts.weights:
        tree = fused["params"][layer.name]
        kernel = np.asarray(tree["kernel"] if layer.name == "linear" else tree["rbr_reparam"]["kernel"])
        assert (layer.lowest, layer.highest, layer.shape) == (kernel.min(), kernel.max(), kernel.shape)
        ranges = np.array([np.abs(kernel[..., channel]).max() for channel in range(kernel.shape[-1])])
        check_spread(layer.spread, ranges)

    pixels = np.stack([eval_transform(Image.open(f).convert("RGB"), model_preprocessing(weights)) for f in photos])
    x = normalize(pixels, model_preprocessing(weights))
    outputs = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    readers = {"stage1_0": "stage0", "stage2_0": "stage1", "stage4_0": "stage3", "pool": "stage4"}
    read = {reader: np.asarray(outputs[stage]) for reader, stage in readers.items()} | {"stage0": x}
    read["linear"] = read["pool"].mean((1, 2))
    inputs = {layer.name: layer for layer in facts.inputs}
    assert list(inputs) == [b.name for b in model.variant.blocks()] + ["pool", "linear"]
    for reader, values in read.items():
        layer = inputs[reader]
        np.testing.assert_allclose((layer.lowest, layer.highest), (values.min(), values.max()), rtol=1e-4, atol=1e-5)
        assert abs(layer.zeros - (values == 0).mean()) <= 2e-3
        exact = np.quantile(np.abs(values), 0.9999, method="inverted_cdf")
        assert exact * 0.999 <= layer.usual <= exact * 1.02
        check_spread(layer.spread, np.abs(values).reshape(-1, values.shape[-1]).max(0), 1e-4)


def model_preprocessing(weights: Path) -> rv.Preprocessing:
    return rv.inspect_weights(weights).preprocessing


def check_spread(spread: Spread, ranges: np.ndarray, tolerance: float = 1e-6) -> None:
    alive = ranges[ranges > 1e-6]
    assert (spread.channels, spread.dead) == (len(ranges), len(ranges) - len(alive))
    expected = (alive.min(), np.median(alive), alive.max(), alive.max() / np.median(alive))
    actual = (spread.least, spread.median, spread.largest, spread.ratio)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-5)
    assert spread.outliers == (alive > 4 * np.median(alive)).sum()
    assert spread.vanishing == (alive < alive.max() / 254).sum()


def test_a_channel_that_one_scale_would_round_to_zero_is_counted():
    ranges = np.array([0.0, 0.1, 1.0, 1.0, 1.0, 1.2, 5.0, 30.0], np.float32)
    spread = Spread.of(ranges)
    assert (spread.channels, spread.dead, spread.outliers, spread.vanishing) == (8, 1, 2, 1)
    assert spread.largest_outliers == (5.0, 30.0)
    assert spread.ratio == 30
    scale = ranges.max() / 127
    assert [round(float(r / scale)) for r in ranges].count(0) == spread.dead + spread.vanishing


def test_the_forms_differ_only_by_rounding(weights, photos):
    direct, planned = facts_of(weights, *photos).differences
    for one in (direct, planned):
        assert one.expected == "training form"
        assert one.images == one.same_class == len(photos)
        assert 0 < one.relative < 1e-5
        assert 0 < one.largest < 1e-4


def test_a_difference_is_measured_as_the_page_says():
    expected = np.array([[1.0, 2.0, 2.0], [4.0, 0.0, 3.0]], np.float32)
    actual = np.array([[1.0, 2.0, 2.5], [4.0, 0.0, 2.0]], np.float32)
    one = difference(("a", "b"), expected, actual, "logits")
    assert (one.largest, one.relative, one.same_class) == (1.0, 0.2, 1)
    assert difference(("a", "b"), expected, actual, "embedding").same_class is None


def test_predictions_equal_those_of_predict(weights, photos, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ODD:
        (odd / name).write_bytes(photos[0].read_bytes())
    files = [*photos, *(odd / name for name in ODD)]
    done = command("repvgg_jax.__main__", "predict", weights, *files, "--format", "json", "-b", 4)
    answers = [json.loads(line)["predictions"] for line in done.stdout.splitlines()]
    shown = [
        [{"class": g.index, "name": g.name, "probability": float(f"{g.probability:.6g}")} for g in photo.guesses]
        for photo in facts_of(weights, *files, batch_size=4).photos
    ]
    assert shown == answers


def test_an_int8_file_is_shown_with_its_saturation_limits(photos, tmp_path):
    model, variables = deploy_net("plain")
    preprocessing = rv.Preprocessing(SIZE, 1.0)
    net = rv.quantize(model, variables, images(), method="per-channel", preprocessing=preprocessing)
    weights = tmp_path / "int8.safetensors"
    rv.save_quantized(weights, net)
    facts = facts_of(weights, *photos)
    (tmp_path / "out.html").write_text(page(facts), encoding="utf-8")
    shown = Page(tmp_path / "out.html")
    check_self_contained(shown)
    assert "INT8 net, so there is no training form to compare with" in shown.text
    assert "An INT8 net has no plan" in shown.text
    (one,) = facts.differences
    assert one.relative <= 1e-5, "all arithmetics give the same integers"
    for layer in facts.inputs:
        params = net.params[layer.name]
        largest = 127 if layer.name == "stage0" else 255
        assert layer.limit is not None
        np.testing.assert_allclose(layer.limit, largest * params["input_scale"], rtol=1e-6)
        assert layer.highest <= layer.limit * (1 + 1e-6)
    for layer in facts.weights:
        params = net.params[layer.name]
        real = np.float32(params["kernel"]) * params["kernel_scale"]
        np.testing.assert_allclose((layer.lowest, layer.highest), (real.min(), real.max()), rtol=1e-6)
    done = command("repvgg_jax.__main__", "predict", weights, *photos, "--format", "json")
    answers = [json.loads(line)["predictions"][0]["class"] for line in done.stdout.splitlines()]
    assert [photo.guesses[0].index for photo in facts.photos] == answers


@pytest.mark.parametrize("name", rv.list_models())
def test_the_stages_costs_add_up_to_the_summary(name):
    from repvgg_jax.net.variants import get_variant

    variant = get_variant(name)
    preprocessing = rv.Preprocessing(variant.image_size, variant.crop_fraction)
    info = rv.WeightsInfo("native", variant, True, 1000, 3, "float32", 0, preprocessing)
    whole, stages = summarize(variant, image_size=variant.image_size), stage_costs(info)
    for field in ("params", "train_params", "flops", "train_flops"):
        assert sum(getattr(stage, field) for stage in stages) == getattr(whole, field), field
    assert round(sum(stage.winograd_muls for stage in stages)) == whole.winograd_muls
