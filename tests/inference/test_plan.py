"""Claim: the cost model's plans for RepVGG-A0 on a CPU are these; changing a constant or a rule shows here."""

import pytest

from repvgg_jax.conv import native
from repvgg_jax.inference.plan import default_plan
from repvgg_jax.net.variants import get_variant


def stages(plan) -> list[str]:
    """Return the algorithms of each stage in order, with repetitions merged."""
    algorithms = [[layer.algorithm for layer in stage.layers] for stage in plan.stages]
    return [", ".join(a for n, a in enumerate(names) if names[n - 1 : n] != [a]) for names in algorithms]


@pytest.mark.parametrize(
    ("batch_size", "dtype", "portion", "expected"),
    [
        (1, "float32", 1, ["native", *["native, native_winograd4"] * 2, "native, native_winograd2", "native"]),
        (16, "float32", 8, ["native", *["native, native_winograd4"] * 3, "native"]),
        (1, "float64", 1, ["direct", "direct", "direct, winograd2", "direct", "direct"]),
        (16, "float64", 4, ["direct", *["direct, winograd4"] * 2, "im2col, winograd2", "im2col"]),
        (16, "bfloat16", 16, ["native_bf16", *["native_bf16, native_bf16_winograd2"] * 3, "native_bf16"]),
    ],
)
def test_the_cost_model_chooses_these_plans(batch_size, dtype, portion, expected):
    if dtype == "float32" and not native.available():
        pytest.skip("no C++ compiler")
    if dtype == "bfloat16" and not native.bf16_available():
        expected = ["direct"] * 5
    elif dtype == "bfloat16" and native.bf16_in_tiles():
        expected = ["native_bf16"] * 5
    plan = default_plan(get_variant("RepVGG-A0"), batch_size, (224, 224), dtype=dtype)
    assert stages(plan) == expected
    assert {stage.portion for stage in plan.stages} == {portion}


@pytest.mark.parametrize(
    ("batch_size", "image_size", "outer"),
    [(1, 224, 1), (8, 224, 8), (10, 224, 5), (16, 224, 8), (17, 224, 9), (64, 224, 8), (3, 448, 1)],
)
def test_groups_of_images_fit_their_memory_and_waste_little(batch_size, image_size, outer):
    plan = default_plan(get_variant("RepVGG-A0"), batch_size, (image_size, image_size))
    assert plan.outer == outer
