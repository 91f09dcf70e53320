"""Claim: every RepVGG computes what an independent PyTorch RepVGG with the same weights computes, in either form."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.net.layers import BatchNorm
from repvgg_jax.trees import flatten
from tests.helpers import torch_oracle
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import (
    SMALL,
    cast,
    equations,
    file_items,
    flax_model,
    fuse,
    initial_variables,
    largest_difference,
    leaves_of,
    make_oracle,
    nchw,
    numpy_logits,
    run,
    to_flax,
    variant_of,
)
from tests.helpers.random_weights import random_variables

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}

pytestmark = pytest.mark.filterwarnings("ignore:.* is not a published variant:repvgg_jax.weights.WeightsWarning")


def to_oracle(model: rv.RepVGG, variables: dict[str, Any], oracle: torch_oracle.RepVGG, folder: Path) -> None:
    """Load the weights back into the oracle: `load_state_dict` is strict."""
    path = folder / "flax.pth"
    rv.save_weights(path, model, variables)
    oracle.load_state_dict(torch.load(path, weights_only=True))


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return normalised images `[N, H, W, C]` as float64, with values that float32 can represent."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


class Pair:
    """The same net in PyTorch and Flax, in one dtype, with images; for float64, use it with 64 bits enabled."""

    def __init__(self, name: str, folder: Path, dtype: str, images: np.ndarray, classes: int = 10):
        self.oracle = make_oracle(name, classes, images.shape[-1])
        self.model = flax_model(name, dtype, classes)
        self.variables = cast(to_flax(self.oracle, name, folder), dtype)
        self.oracle.to(getattr(torch, dtype))
        self.images, self.dtype = images.astype(dtype), dtype

    def check(self, run: Callable = run) -> None:
        """Check both forms and training."""
        with torch.no_grad():
            self.check_evaluation(run)
            self.check_deploy(run)
            self.check_training(run)

    def check_evaluation(self, run: Callable = run) -> None:
        """Compare the training form on running statistics."""
        expected = numpy_logits(self.oracle.eval()(nchw(self.images, self.dtype)))
        actual = numpy_logits(run(self.model.apply, self.variables, self.images))
        assert actual.keys() == {"main"}
        assert actual["main"].dtype == self.dtype
        assert 0.02 < np.abs(expected["main"]).mean() < 50, "the test's own weights are badly scaled"
        assert relative_difference(expected["main"], actual["main"]) <= TOLERANCE[self.dtype]

    def check_deploy(self, run: Callable = run) -> None:
        """Compare the deploy forms, each fused by its own library."""
        expected = torch_oracle.switch_to_deploy(self.oracle)(nchw(self.images, self.dtype))
        deploy_model, deploy_variables = fuse(self.model, self.variables)
        actual = run(deploy_model.apply, deploy_variables, self.images)
        assert actual.dtype == self.dtype
        assert relative_difference(expected, actual) <= TOLERANCE[self.dtype]

    def check_training(self, run: Callable = run) -> None:
        """Compare the logits on batch statistics, and the running statistics afterwards.

        Float32 rounding grows with depth when every layer divides by a batch's own deviation. If it moves PyTorch's
        logits away from the float64 ones by more than the tolerance, ours may differ by twice as much.
        """
        allowed = TOLERANCE[self.dtype]
        before = {key: value.clone() for key, value in self.oracle.state_dict().items()}
        expected = numpy_logits(self.oracle.train()(nchw(self.images, self.dtype)))
        statistics = leaves_of(self.oracle, self.model.variant)
        if self.dtype == "float32":
            self.oracle.load_state_dict(before)
            exact = numpy_logits(self.oracle.double()(nchw(self.images, "float64")))
            pytorch_errors = [relative_difference(exact[head], logits) for head, logits in expected.items()]
            allowed = max(allowed, 2 * max(pytorch_errors))

        def in_training(variables: Any, images: Any) -> Any:
            return self.model.apply(variables, images, train=True, mutable=["batch_stats"])

        outputs, changed = run(in_training, self.variables, self.images)
        actual = numpy_logits(outputs)
        assert actual.keys() == expected.keys()
        for head, logits in expected.items():
            assert relative_difference(logits, actual[head]) <= allowed, head
        assert set(flatten(changed)) == {name for name in statistics if name.startswith("batch_stats/")}
        assert largest_difference(statistics, changed, "batch_stats/") <= allowed
        assert largest_difference(flatten(self.variables), changed, "batch_stats/") > 0.01, "they have not moved"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in SMALL),
        ("plus", "float32"),
        *(pytest.param(name, "float32", marks=pytest.mark.slow) for name in SMALL if name != "plus"),
    ],
)
def test_small_nets_of_every_kind_equal_pytorchs(name, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        Pair(name, tmp_path, dtype, noise((4, 64, 64, 3))).check()


def test_a_published_variant_equals_pytorchs(tmp_path):
    Pair("RepVGG-A0", tmp_path, "float32", noise((4, 64, 64, 3))).check()


def test_a_published_variant_with_groups_equals_pytorchs(tmp_path):
    Pair("RepVGG-B1g2", tmp_path, "float32", noise((2, 64, 64, 3))).check_evaluation()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", rv.list_models())
def test_every_published_variant_equals_pytorchs(name, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        compiled = lambda function, *arguments: jax.jit(function)(*arguments)  # noqa: E731
        Pair(name, tmp_path, dtype, noise((4, 96, 96, 3)), classes=1000).check(compiled)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("grouped", (3, 33, 47, 1), 1),
        pytest.param("SE before ReLU", (2, 65, 34, 4), 7, marks=pytest.mark.slow),
        pytest.param("grouped", (8, 1, 32, 3), 7, marks=pytest.mark.slow),
    ],
    ids=["grey, odd sizes, 1 class", "4 channels, 7 classes", "one pixel high"],
)
def test_any_size_channels_and_classes_equal_pytorchs(name, shape, classes, tmp_path):
    with jax.enable_x64(True):
        Pair(name, tmp_path, "float64", noise(shape), classes).check()


def test_weights_load_back_into_the_oracle(tmp_path):
    name, images = "grouped", noise((2, 64, 64, 3))
    model = flax_model(name, "float32")
    variables = random_variables(model)
    oracle = make_oracle(name, seed=None)
    to_oracle(model, variables, oracle, tmp_path)
    with torch.no_grad():
        expected = oracle.eval()(nchw(images))
    assert relative_difference(expected, run(model.apply, variables, images.astype(np.float32))) <= 1e-5


def test_every_key_in_the_authors_files_has_one_leaf():
    for name in ("RepVGG-A0", "RepVGG-D2se", "RepVGGplus-L2pse"):
        with torch.device("meta"):
            oracle = make_oracle(name, 1000, seed=None)
        keys = [item.key for item in file_items(variant_of(name), 1000, 3)]
        assert keys == list(oracle.state_dict())


def test_running_variance_is_unbiased():
    """Like PyTorch's; the batch itself is normalised with the biased variance."""
    x = np.array([0.0, 2.0], np.float32).reshape(2, 1, 1, 1)  # biased variance 1, unbiased 2
    variables = BatchNorm().init(jax.random.key(0), x)
    y, changed = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    statistics = flatten(changed)
    np.testing.assert_allclose(statistics["batch_stats/mean"], [0.1], rtol=1e-6)
    np.testing.assert_allclose(statistics["batch_stats/var"], [0.9 * 1 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(np.asarray(y)), [-1, 1], rtol=1e-4)


def test_bfloat16_keeps_float32_where_it_counts():
    images = noise((8, 64, 64, 3)).astype(np.float32)
    exact = flax_model("plus", "float32")
    model = exact.clone(dtype=jnp.bfloat16)
    variables = random_variables(model)
    fresh = jax.eval_shape(model.init, jax.random.key(0), images)
    in_training = jax.eval_shape(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, in_training))} == {jnp.dtype("float32")}

    forms = [(model, variables), (model.clone(deploy=True), fuse(model, variables)[1])]
    for form, tree in forms:
        jaxpr = jax.make_jaxpr(lambda v, form=form: form.apply(v, images))(tree)
        convolutions = [e for e in equations(jaxpr) if e.primitive.name == "conv_general_dilated"]
        assert len(convolutions) >= len(model.variant.blocks())
        assert {e.outvars[0].aval.dtype for e in convolutions} == {jnp.dtype("bfloat16")}
    difference = relative_difference(run(exact.apply, variables, images), run(model.apply, variables, images))
    assert 1e-4 < difference < 0.05


@pytest.mark.slow
def test_rematerialisation_changes_memory_not_results():
    variant = rv.Variant((1, 2, 1, 1), (4, 4, 4, 4, 4), 2)
    images = noise((2, 48, 48, 3))
    with jax.enable_x64(True):
        plain = rv.create_model(variant, 3, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = random_variables(plain, dtype=np.float64)

        def gradient_of(model: rv.RepVGG) -> Callable:
            def loss(params):
                tree = {**variables, "params": params}
                outputs, changed = model.apply(tree, images, train=True, mutable=["batch_stats"])
                return sum(jnp.square(logits).sum() for logits in jax.tree.leaves(outputs)), changed

            return jax.value_and_grad(loss, has_aux=True)

        def checkpoints(model: rv.RepVGG) -> int:
            jaxpr = jax.make_jaxpr(gradient_of(model))(variables["params"])
            return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in equations(jaxpr))

        remat = plain.clone(remat=True)
        assert checkpoints(plain) == 0
        assert checkpoints(remat) == len(variant.blocks())
        expected, actual = (run(gradient_of(model), variables["params"]) for model in (plain, remat))
        assert jax.tree.structure(expected) == jax.tree.structure(actual)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11), expected, actual)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(("name", "widths"), [("RepVGG-A1", (64, 64, 128, 256, 1280)), ("plus", (16, 16, 32, 64, 128))])
def test_features_are_the_outputs_of_the_five_stages(name, widths, deploy):
    model = flax_model(name, "float32", deploy=deploy)
    images = jax.ShapeDtypeStruct((2, 70, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
    sizes = [(35, 48), (18, 24), (9, 12), (5, 6), (3, 3)]
    expected = {f"stage{i}": (2, *size, width) for i, (size, width) in enumerate(zip(sizes, widths, strict=True))}
    assert {stage: feature.shape for stage, feature in features.items()} == expected


def test_the_head_reads_the_last_feature():
    model = flax_model("plus", "float32")
    variables, images = random_variables(model), noise((2, 64, 64, 3)).astype(np.float32)
    features = run(lambda v: model.apply(v, images, method="features"), variables)
    pooled, linear = features["stage4"].mean((1, 2)), variables["params"]["linear"]
    logits = run(model.apply, variables, images)
    np.testing.assert_allclose(logits, pooled @ linear["kernel"] + linear["bias"], rtol=1e-4, atol=1e-5)


def test_only_repvggplus_in_training_returns_a_dict():
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def outputs(name: str, train: bool, deploy: bool = False) -> Any:
        model = flax_model(name, "float32", 9, deploy=deploy)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def apply(variables: Any, images: Any) -> Any:
            return model.apply(variables, images, train=train, mutable=["batch_stats"])[0]

        return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(apply, variables, images))

    four = ("main", "stage1_aux", "stage2_aux", "stage3_first_aux")
    assert outputs("plus", train=True) == dict.fromkeys(four, (2, 9))
    assert outputs("plus", train=False) == (2, 9)
    assert outputs("plus", train=True, deploy=True) == (2, 9)
    assert outputs("SE before ReLU", train=True) == (2, 9)


def test_initialisation_matches_pytorchs():
    """Every leaf is drawn uniformly from PyTorch's range, or has PyTorch's constant; no two draws are the same."""
    oracle, model = make_oracle("plus", seed=None), flax_model("plus", "float32")
    torchs = leaves_of(oracle, model.variant)
    ours, other = map(flatten, initial_variables(model, seeds=(0, 1)))
    assert ours.keys() == torchs.keys()
    drawn = [leaf for leaf in ours if leaf.endswith(("/kernel", "/bias")) and "bn/" not in leaf]
    drawn = [leaf for leaf in drawn if "rbr_identity/" not in leaf]
    for leaf in ours.keys() - set(drawn):
        np.testing.assert_array_equal(ours[leaf], torchs[leaf], leaf)
    for leaf in drawn:
        bound = bound_of(leaf, ours)
        for values in (torchs[leaf], np.asarray(ours[leaf])):
            assert np.abs(values).max() <= bound, leaf
            if values.size >= 256:
                assert values.max() > 0.95 * bound, leaf
                assert values.min() < -0.95 * bound, leaf
                assert abs(values.std() / (bound / 3**0.5) - 1) < 0.15, leaf
    assert len({np.ravel(ours[leaf])[0].item() for leaf in drawn}) == len(drawn)
    assert all(np.ravel(ours[leaf])[0] != np.ravel(other[leaf])[0] for leaf in drawn)


def bound_of(leaf: str, leaves: dict[str, Any]) -> float:
    """Return 1 / sqrt(fan in) of the layer's kernel: the bound of torch.nn.Conv2d and torch.nn.Linear."""
    kernel = leaves[leaf.rpartition("/")[0] + "/kernel"]
    return float(np.prod(kernel.shape[:-1])) ** -0.5


def test_the_deploy_form_initialises_like_a_grouped_pytorch_convolution():
    (variables,) = map(flatten, initial_variables(flax_model("grouped", "float32", deploy=True)))
    assert {leaf.split("/")[0] for leaf in variables} == {"params"}
    for leaf, values in variables.items():
        bound = bound_of(leaf, variables)
        assert 0.5 * bound < np.abs(values).max() <= bound, leaf


def test_an_unknown_name_suggests_similar_ones():
    with pytest.raises(rv.UnknownModelError, match=r"unknown model 'RepVGG-B1g3'; did you mean .*RepVGG-B1g"):
        rv.create_model("RepVGG-B1g3")
    with pytest.raises(rv.UnknownModelError, match="did you mean RepVGGplus-L2pse"):
        rv.create_model("repvggplus")
    with pytest.raises(rv.UnknownModelError, match=r"known: RepVGG-A0, .*RepVGGplus-L2pse"):
        rv.create_model("zzz")
    assert rv.create_model("repvgg-b1G4").variant.name == "RepVGG-B1g4"


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        rv.create_model("RepVGG-A0", num_classes=0)
    with pytest.raises(ValueError, match=r"images must have shape \[N, H, W, C\], not \[64, 64, 3\]"):
        rv.create_model("RepVGG-A0").init(jax.random.key(0), np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="stage1_1: 20 -> 20 channels cannot be split into 8 groups"):
        rv.Variant((2, 2, 2, 1), (20, 20, 20, 20, 20), groups=8)


def test_importing_the_library_imports_neither_torch_nor_tensorflow():
    code = "import sys, repvgg_jax; print([name for name in ('torch', 'tensorflow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_models_use_nothing_deprecated():
    model = flax_model("plus", "float32", remat=True)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", FutureWarning)
        variables = jax.eval_shape(model.init, jax.random.key(1), images)

        def loss(params: Any, images: Any) -> Any:
            tree = {**variables, "params": params}
            outputs, _ = model.apply(tree, images, train=True, mutable=["batch_stats"])
            return outputs["main"].sum()

        jax.eval_shape(lambda variables: rv.to_deploy(model, variables)[1], variables)
        jax.make_jaxpr(model.apply)(variables, images)
