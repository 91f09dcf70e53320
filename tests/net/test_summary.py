"""Claim: parameters, FLOPs and Winograd multiplications match the published tables and the nets themselves.

How the tables count is in docs/counting.md.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.net.summary import summarize, summary_table, truncated
from repvgg_jax.net.variants import VARIANTS, Variant
from tests.helpers.commands import command
from tests.helpers.parity import equations
from tests.helpers.random_weights import random_variables

# Paper, Tables 4 and 5: millions of parameters, billions of multiply-adds, billions of Winograd multiplications.
PAPER = {
    "RepVGG-A0": (8.30, 1.4, 0.7),
    "RepVGG-A1": (12.78, 2.4, 1.3),
    "RepVGG-B0": (14.33, 3.1, 1.6),
    "RepVGG-A2": (25.49, 5.1, 2.7),
    "RepVGG-B1g4": (36.12, 7.3, 3.9),
    "RepVGG-B1g2": (41.36, 8.8, 4.6),
    "RepVGG-B1": (51.82, 11.8, 5.9),
    "RepVGG-B2g4": (55.77, 11.3, 6.0),
    "RepVGG-B2": (80.31, 18.4, 9.1),
    "RepVGG-B3g4": (75.62, 16.1, 8.4),
    "RepVGG-B3": (110.96, 26.2, 12.9),
}
# MMPretrain's model zoo is a second count, rounded: millions of parameters of the training and the deploy form.
MMPRETRAIN = {
    "RepVGG-A0": (9.11, 8.31),
    "RepVGG-A1": (14.09, 12.79),
    "RepVGG-A2": (28.21, 25.50),
    "RepVGG-B0": (15.82, 14.34),
    "RepVGG-B1": (57.42, 51.83),
    "RepVGG-B1g2": (45.78, 41.36),
    "RepVGG-B1g4": (39.97, 36.13),
    "RepVGG-B2": (89.02, 80.32),
    "RepVGG-B2g4": (61.76, 55.78),
    "RepVGG-B3": (123.09, 110.96),
    "RepVGG-B3g4": (83.83, 75.63),
    "RepVGG-D2se": (133.33, 120.39),
}
CHECKED = ("RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se")
SOME = [name if name in CHECKED else pytest.param(name, marks=pytest.mark.slow) for name in rv.list_models()]


@pytest.mark.parametrize("name", list(PAPER))
def test_costs_match_the_papers_tables(name):
    cost, (params, flops, winograd_muls) = summarize(VARIANTS[name]), PAPER[name]
    assert truncated(cost.params / 1e6, 2) == params, "the paper truncates its parameter counts"
    assert round(cost.flops / 1e9, 1) == flops
    assert round(cost.winograd_muls / 1e9, 1) == winograd_muls


def test_the_library_records_the_papers_figures():
    for name, variant in VARIANTS.items():
        printed = variant.published
        figures = (printed.params_millions, printed.flops_billions, printed.winograd_muls_billions)
        assert figures == PAPER.get(name, (None, None, None))


@pytest.mark.parametrize("name", list(MMPRETRAIN))
def test_parameters_match_mmpretrains_model_zoo(name):
    cost = summarize(VARIANTS[name])
    assert (round(cost.train_params / 1e6, 2), round(cost.params / 1e6, 2)) == MMPRETRAIN[name]


def test_the_same_rules_give_the_papers_figures_for_vgg_16():
    """Shows that the rules are the paper's and not fitted to RepVGG: 138.35 M, 15.5 B, 6.9 B."""
    widths, sizes = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), (224, 112, 56, 28, 14)
    per_stage = (2, 2, 3, 3, 3)
    pixels = [size * size for size, count in zip(sizes, per_stage, strict=True) for _ in range(count)]
    params = muls = 0
    for inputs, outputs, area in zip((3, *widths), widths, pixels, strict=False):
        params += 9 * inputs * outputs + outputs
        muls += 9 * inputs * outputs * area
    linear = 512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000
    params += linear + 4096 + 4096 + 1000
    assert truncated(params / 1e6, 2) == 138.35
    assert round((muls + linear) / 1e9, 1) == 15.5
    assert round((muls * 4 / 9 + linear) / 1e9, 1) == 6.9


@pytest.mark.parametrize("name", rv.list_models())
def test_parameters_match_the_parameter_tree(name):
    variant = VARIANTS[name]
    for classes, channels in ((1000, 3), (7, 1)):
        cost = summarize(variant, num_classes=classes, in_channels=channels)
        for deploy, counted in ((True, cost.params), (False, cost.train_params)):
            shapes = expected_shapes(variant, deploy, classes, channels)
            assert counted == sum(math.prod(s) for leaf, s in shapes.items() if leaf.startswith("params/"))


def abstract(name: str, deploy: bool, size: int) -> tuple[rv.RepVGG, Any, jax.ShapeDtypeStruct]:
    """Return a model, its variables and an image, as shapes only."""
    model, image = rv.create_model(name, deploy=deploy), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), image), image


def multiply_adds(model: rv.RepVGG, variables: Any, image: Any) -> int:
    """Return the multiply-adds of every convolution and matrix product that the model runs, from its jaxpr."""
    total = 0
    for equation in equations(jax.make_jaxpr(model.apply)(variables, image)):
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "conv_general_dilated":
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1][:-1])
        elif equation.primitive.name == "dot_general":
            total += math.prod(shapes[0]) * shapes[1][-1]
    return total


@pytest.mark.parametrize("name", SOME)
def test_flops_and_parameters_match_the_model(name):
    for deploy in (True, False):
        model, variables, image = abstract(name, deploy, 97)  # an odd size, to count rounding up as the model does
        cost = summarize(model.variant, image_size=97)
        assert multiply_adds(model, variables, image) == (cost.flops if deploy else cost.train_flops)
        counted = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert counted == (cost.params if deploy else cost.train_params)


@pytest.mark.parametrize("name", SOME)
def test_xla_counts_the_same_without_the_padding(name):
    """XLA skips products with the padding's zeros (except in layers that run as matrix products) and counts the cheap
    operations too: together less than two per cent."""
    model, variables, image = abstract(name, True, 224)
    analysis: Any = jax.jit(model.apply).lower(variables, image).cost_analysis()
    inside = without_padding(model.variant, 224)
    assert inside < analysis["flops"] / 2 < 1.02 * inside
    assert inside < summarize(model.variant).flops


def without_padding(variant: Variant, size: int) -> int:
    """Return the multiply-adds of the 3x3 convolutions with real pixels only, and of the classifier."""
    total = 1000 * variant.widths[-1]
    for block in variant.blocks():
        inputs, size = size, math.ceil(size / block.stride)
        centres = np.arange(size) * block.stride
        taps = sum(int(((centres + offset >= 0) & (centres + offset < inputs)).sum()) for offset in (-1, 0, 1))
        total += taps**2 * block.in_channels // block.groups * block.out_channels
    return total


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGGplus-L2pse"])
def test_activation_memory_is_the_largest_input_and_output_of_a_block(name):
    model, variables, image = abstract(name, True, 224)
    convolutions = [
        equation
        for equation in equations(jax.make_jaxpr(model.apply)(variables, image))
        if equation.primitive.name == "conv_general_dilated" and equation.invars[1].aval.shape[0] == 3
    ]
    sizes = [math.prod(e.invars[0].aval.shape) + math.prod(e.outvars[0].aval.shape) for e in convolutions]
    assert summarize(model.variant).peak_activation_bytes == 4 * max(sizes)


def test_the_table_shows_ours_next_to_the_published():
    table = summary_table()
    lines = {line.split()[0]: line for line in table.splitlines() if line.startswith("RepVGG")}
    assert list(lines) == rv.list_models()
    for name, (params, flops, winograd_muls) in PAPER.items():
        for text in (f"{params:.2f} [{params:.2f}]", f"{flops} [{flops}]", f"{winograd_muls} [{winograd_muls}]"):
            assert text in lines[name]
    assert "[83.55]" in lines["RepVGG-D2se"]
    assert "320x320" in summary_table(image_size=320).splitlines()[-3]


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 0), ("image_size", -224), ("num_classes", 0), ("in_channels", 0)]
)
def test_sizes_must_be_positive(name, value):
    with pytest.raises(rv.ConfigError, match=f"{name} must be at least 1, not {value}"):
        summarize(VARIANTS["RepVGG-A0"], **{name: value})
    if name != "in_channels":
        with pytest.raises(rv.ConfigError, match=f"{name} must be at least 1, not {value}"):
            summary_table(**{name: value})


def test_a_weight_files_summary_states_its_input_and_classes(tmp_path):
    variant = Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), image_size=32)
    model = rv.create_model(variant, 3)
    rv.save_weights(tmp_path / "a.safetensors", model, random_variables(model), class_names=("lamp", "été", "a, b"))
    done = command("repvgg_jax.__main__", "summary", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert "training form" in done.stdout
    assert "3 classes, 3 input channels" in done.stdout
    assert "images: 32 pixels, centre crop 0.875 of the shorter side resized to 37, " in done.stdout
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225 (of pixel values in 0..1)" in done.stdout
    assert "class names: lamp, été, a, b\n" in done.stdout
    assert "one 32x32 image, 3 classes" in done.stdout


def test_many_classes_other_sizes_and_a_variant_next_to_a_file(tmp_path):
    variant = Variant((1, 1, 1, 1), (4, 4, 4, 8, 8))
    model = rv.create_model(variant, 25, deploy=True)
    path = tmp_path / "grey.safetensors"
    how, names = rv.Preprocessing(40, 1.0, (0.5,), (0.25,)), tuple(f"n{i}" for i in range(25))
    rv.save_weights(path, model, random_variables(model, in_channels=1), preprocessing=how, class_names=names)
    done = command("repvgg_jax.__main__", "summary", path, "RepVGG-A0", "--image-size", 64)
    assert done.returncode == 0, done.stderr
    assert "deploy form" in done.stdout
    assert "n8, n9, and 15 more" in done.stdout
    assert "25 classes, 1 input channels" in done.stdout
    assert "images: 40 pixels, " in done.stdout
    assert "one 64x64 image, 25 classes" in done.stdout
    assert "one 64x64 image, 1000 classes" in done.stdout
    done = command("repvgg_jax.__main__", "summary", tmp_path / "none.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none.safetensors'} does not exist\n"
