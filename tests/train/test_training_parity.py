"""Claim: training follows PyTorch's step by step: the same losses, weights and running statistics.

Both sides start from the same weights and see the same batches of real photographs; ours uses the functions that
`train.main` uses.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.optim.swa_utils import AveragedModel

import repvgg_jax as rv
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.preprocess import Preprocessing, normalize
from repvgg_jax.trees import flatten, unflatten
from tests.helpers import torch_oracle
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import (
    cast,
    compiled,
    file_items,
    flax_model,
    largest_difference,
    leaves_of,
    make_oracle,
    nchw,
    to_flax,
    variant_of,
)
from train.mixing import blend_with_partner
from train.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from train.presets import PRESETS
from train.recipe import OptimizerOptions
from train.state import TrainState
from train.step import Batch, Mixing, make_train_step

STEPS, CLASSES, SIZE = 10, 6, 32

# Two epochs of five steps: a peak of 0.02, and a decay strong enough to show within ten steps.
PLAIN = OptimizerOptions(epochs=2, batch_size=16, learning_rate=0.32, weight_decay=0.01)
FULL = dataclasses.replace(PLAIN, nesterov=True, warmup_epochs=0.6, label_smoothing=0.1)

# In float64 the input must be identical to the last bit. XLA may divide by 255 or multiply by 1 / 255, and may or may
# not round before it subtracts a mean; with no mean and a power of two, only the former choice is left, and that is
# the same wherever XLA compiles it.
EXACT = Preprocessing(SIZE, mean=(0.0, 0.0, 0.0), std=(0.25, 0.25, 0.25))

pytestmark = pytest.mark.filterwarnings("ignore:.* is not a published variant:repvgg_jax.weights.WeightsWarning")


def photograph_batches(size: int = SIZE, batch_size: int = 16, seed: int = 0) -> list[Batch]:
    """Return crops of two photographs, labelled by photograph and by third of its width."""
    photographs, rng = load_sample_images().images, np.random.default_rng(seed)

    def cut() -> tuple[np.ndarray, int]:
        number, step = rng.integers(2), rng.integers(1, 4)
        height, width, _ = photographs[number].shape
        top, left = rng.integers(height - size * step), rng.integers(width - size * step)
        third = int(3 * (left + size * step / 2) / width)
        pixels = photographs[number][top : top + size * step : step, left : left + size * step : step]
        return pixels, int(3 * number + third)

    batches = []
    for _ in range(STEPS):
        images, labels = zip(*(cut() for _ in range(batch_size)), strict=True)
        batches.append({"image": np.stack(images), "label": np.array(labels, np.int32)})
    return batches


def rates_of(config: OptimizerOptions) -> np.ndarray:
    """Return the schedule's learning rate for each step, float32 [STEPS].

    Both sides look it up, since the last bit of a cosine depends on the code compiled around it.
    """
    with jax.enable_x64(False):
        schedule = learning_rate_schedule(config, STEPS // config.epochs)
        return np.array([schedule(step) for step in range(STEPS)], np.float32)


def train_ours(
    model: rv.RepVGG,
    variables: Any,
    batches: list[Batch],
    config: OptimizerOptions,
    preprocessing: Preprocessing,
    mixing: Mixing | None = None,
) -> tuple[list[float], TrainState]:
    """Return the loss before each step, and the final state."""
    rates = jnp.asarray(rates_of(config))
    schedule = lambda step: rates[step]  # noqa: E731
    optimizer = make_optimizer(config, schedule)
    train_step = make_train_step(
        model,
        optimizer,
        schedule,
        preprocessing,
        label_smoothing=config.label_smoothing,
        auxiliary_weight=config.auxiliary_weight,
        mixing=mixing,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
    params, stats = variables["params"], variables["batch_stats"]
    averages = dict(ema_params=params, ema_batch_stats=stats) if config.ema_decay else {}
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), **averages)
    step, losses = compiled(train_step, state, batches[0]), []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == STEPS
    return losses, state


def train_oracle(
    oracle: torch_oracle.RepVGG,
    batches: list[Batch],
    config: OptimizerOptions,
    preprocessing: Preprocessing,
    **options: Any,
) -> list[float]:
    """Return the losses with `torch.optim.SGD`, autograd and torch's cross-entropy."""
    prepare = jax.jit(lambda images: normalize(images, preprocessing))
    dtype = str(oracle.linear.weight.dtype).removeprefix("torch.")
    return torch_oracle.sgd_steps(
        oracle,
        [(nchw(np.asarray(prepare(b["image"])), dtype), torch.from_numpy(b["label"]).long()) for b in batches],
        rates_of(config).tolist(),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        label_smoothing=config.label_smoothing,
        aux_weight=config.auxiliary_weight,
        accumulate=config.accumulate,
        **options,
    )


CASES = {"plus": FULL}
# With 22 and 28 layers, long steps and a BN over 16 values would amplify the last bit of a float32 weight to a third of
# the loss, even in PyTorch alone.
DEEP_CASES = {
    "RepVGG-A0": dataclasses.replace(FULL, learning_rate=0.03),
    "RepVGG-B0": dataclasses.replace(PLAIN, learning_rate=0.03),
}


SLOW_CASES = {"grouped": PLAIN, "SE before ReLU": FULL} | DEEP_CASES


def size_of(name: str) -> int:
    """Return the image side in pixels, enough for the last stage's BN."""
    return 2 * SIZE if name in DEEP_CASES else SIZE


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_ten_steps_in_float64_follow_pytorchs(name, tmp_path):
    config = (CASES | SLOW_CASES)[name]
    oracle, batches = make_oracle(name, CLASSES), photograph_batches(size_of(name))
    start = to_flax(oracle, name, tmp_path)
    with jax.enable_x64(True):
        losses, state = train_ours(flax_model(name, "float64", CLASSES), cast(start, "float64"), batches, config, EXACT)
    expected_losses = train_oracle(oracle.double(), batches, config, EXACT)
    expected = leaves_of(oracle, variant_of(name))
    assert relative_difference(expected_losses, losses) <= 1e-10
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {np.dtype("float64")}
    assert flatten(state.variables).keys() == expected.keys()
    assert largest_difference(expected, state.variables) <= 1e-10
    assert largest_difference(flatten(start), state.variables, "params/") > 0.01, "nothing was learned"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["plus", "grouped", "SE before ReLU"],
)
def test_ten_steps_in_float32_follow_pytorchs(name, tmp_path):
    """Up to rounding: about as far from exact arithmetic as PyTorch in float32, with the real preprocessing.

    Within ten steps, rounding occasionally decides on which side of zero a ReLU's input is, and the loss jumps, by the
    same amount in both libraries but not in the same run. So steps are short, and PyTorch runs several times, from
    weights that differ in their last two bits, as much as a Winograd convolution rounds. Ours may be as far from exact
    arithmetic as those runs are.

    Not for the full-size nets, where PyTorch's own float32 moves some weights by several per cent within ten steps.
    """
    config = dataclasses.replace(CASES[name], learning_rate=0.01)
    batches, preprocessing = photograph_batches(), Preprocessing(SIZE)
    start = to_flax(make_oracle(name, CLASSES), name, tmp_path)
    losses, state = train_ours(flax_model(name, "float32", CLASSES), start, batches, config, preprocessing)
    variant, exact = variant_of(name), make_oracle(name, CLASSES).double()
    exact_losses = train_oracle(exact, batches, config, preprocessing)
    exact_leaves = leaves_of(exact, variant)
    their_losses, their_leaves = [], []
    for seed in range(8):
        oracle = in_the_last_bits(make_oracle(name, CLASSES), seed)
        their_losses.append(relative_difference(exact_losses, train_oracle(oracle, batches, config, preprocessing)))
        their_leaves.append(largest_difference(exact_leaves, unflatten(leaves_of(oracle, variant))))

    def far(theirs: list[float]) -> float:
        assert max(theirs) < 1e-2, "the test's own numbers are too unstable to compare"
        return max(2e-5, 3 * max(theirs))

    assert relative_difference(exact_losses, losses) <= far(their_losses)
    assert largest_difference(exact_leaves, state.variables) <= far(their_leaves)


def in_the_last_bits(oracle: torch_oracle.RepVGG, seed: int) -> torch_oracle.RepVGG:
    """Move the weights by up to four roundings, at random; seed 0 leaves them unchanged."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in oracle.parameters():
            steps = torch.randint(-4, 5, parameter.shape, generator=generator) * bool(seed)
            parameter.mul_(1 + torch.finfo(torch.float32).eps * steps)
    return oracle


@pytest.mark.parametrize(
    "name", ["plus", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped", "SE before ReLU"))]
)
def test_mixup_accumulation_and_the_moving_average_follow_pytorchs(name, tmp_path):
    share, decay = 0.3, 0.6
    config = dataclasses.replace(FULL, accumulate=2, ema_decay=decay)
    oracle, batches = make_oracle(name, CLASSES), photograph_batches()
    start = to_flax(oracle, name, tmp_path)
    mixing = lambda _, images, targets: blend_with_partner(images.astype("float64"), targets, share)  # noqa: E731
    with jax.enable_x64(True):
        model = flax_model(name, "float64", CLASSES)
        losses, state = train_ours(model, cast(start, "float64"), batches, config, EXACT, mixing)

    def average(old: torch.Tensor, new: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        # The initial weights count as one.
        kept = np.minimum(np.float32(decay), np.float32(int(count) / (9 + int(count))))
        return old + float(1 - kept) * (new - old)

    oracle = oracle.double()
    averaged = AveragedModel(oracle, avg_fn=average, use_buffers=True)
    averaged.update_parameters(oracle)  # the first call copies
    expected_losses = train_oracle(oracle, batches, config, EXACT, mixup=share, average=averaged)
    assert relative_difference(expected_losses, losses) <= 1e-10
    assert largest_difference(leaves_of(oracle, variant_of(name)), state.variables) <= 1e-10
    expected = leaves_of(cast_module(averaged.module), variant_of(name))
    assert largest_difference(expected, state.ema_variables) <= 1e-10
    assert largest_difference(expected, state.variables) > 1e-3, "the average equals the weights"


def cast_module(module: Any) -> torch_oracle.RepVGG:
    """Return what `AveragedModel` wraps, with its own type."""
    assert isinstance(module, torch_oracle.RepVGG)
    return module


def mask_by_leaf(variant: rv.Variant) -> dict[str, bool]:
    """Return the decay mask of the variant's parameter tree, by leaf."""
    without_numbers = unflatten({leaf: np.empty(0) for leaf in expected_shapes(variant, False, 10, 3)})
    mask: Any = decay_mask(without_numbers["params"])
    return flatten({"params": mask})


@pytest.mark.parametrize("name", rv.list_models())
def test_weight_decay_applies_where_the_recipe_says(name):
    """In every variant, exactly the leaves that the oracle's rule names are decayed."""
    with torch.device("meta"):
        oracle = make_oracle(name, seed=None)
    decayed, spared = torch_oracle.recipe_parameter_groups(oracle, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    chosen = {id(parameter) for parameter in decayed["params"]}
    expected = {key for key, parameter in oracle.named_parameters() if id(parameter) in chosen}
    variant = variant_of(name)
    leaf_of_key = {item.key: item.leaf for item in file_items(variant, 10, 3)}

    mask = mask_by_leaf(variant)
    assert {leaf for leaf, decays in mask.items() if decays} == {leaf_of_key[key] for key in expected}
    assert {leaf for leaf, decays in mask.items() if not decays} == {
        leaf_of_key[key] for key, _ in oracle.named_parameters() if key not in expected
    }


def test_the_decay_rule_by_example():
    mask = mask_by_leaf(variant_of("plus"))
    for leaf, decays in {
        "stage0/rbr_dense/conv/kernel": True,
        "stage0/rbr_1x1/conv/kernel": True,
        "stage2_1/rbr_identity/scale": True,
        "stage2_1/post_se/down/kernel": True,
        "stage2_1/post_se/up/kernel": True,
        "linear/kernel": True,
        "stage1_aux/conv/kernel": True,
        "stage1_aux/linear/kernel": True,
        "stage0/rbr_dense/bn/scale": False,
        "stage0/rbr_1x1/bn/scale": False,
        "stage2_1/rbr_identity/bias": False,
        "stage0/rbr_dense/bn/bias": False,
        "stage2_1/post_se/down/bias": False,
        "stage1_aux/bn/scale": False,
        "stage1_aux/linear/bias": False,
        "linear/bias": False,
    }.items():
        assert mask[f"params/{leaf}"] is decays, leaf


def test_decay_comes_before_momentum_and_the_learning_rate_after():
    """Two steps without gradients: -lr * decay * w, then -lr * (momentum + 1) * decay * w, in decayed leaves only."""
    params = {"linear": {"kernel": np.array([2.0, -3.0]), "bias": np.array([5.0])}}
    config = OptimizerOptions(momentum=0.9, weight_decay=0.01)
    optimizer = make_optimizer(config, optax.constant_schedule(0.5))
    state, nothing = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    for factor in (1.0, 1.9):
        updates: Any
        updates, state = optimizer.update(nothing, state, params)
        np.testing.assert_allclose(updates["linear"]["kernel"], -0.5 * factor * 0.01 * np.array([2.0, -3.0]), 1e-5)
        np.testing.assert_array_equal(updates["linear"]["bias"], [0.0])


def expected_rate(config: OptimizerOptions, steps_per_epoch: int, step: int) -> float:
    """Return a linear warm-up from 0, then half a cosine to 0; the peak is for a batch of 256."""
    peak = config.learning_rate * config.batch_size / 256
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def rate_at(config: OptimizerOptions, steps_per_epoch: int, step: int) -> float:
    return np.asarray(learning_rate_schedule(config, steps_per_epoch)(step)).item()


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("batch_size", [256, 1024])
def test_the_schedule_of_every_preset_matches_the_formula(preset, batch_size):
    config = dataclasses.replace(PRESETS[preset].optimizer, batch_size=batch_size)
    steps_per_epoch = 1_281_167 // batch_size
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    peak = config.learning_rate * batch_size / 256
    start = 0.0 if warmup else peak
    for step, rate in ((0, start), (warmup, peak), ((warmup + total) // 2, None), (total - 1, None), (total, 0.0)):
        expected = expected_rate(config, steps_per_epoch, step)
        assert rate is None or math.isclose(rate, expected, abs_tol=1e-12)
        assert math.isclose(rate_at(config, steps_per_epoch, step), expected, rel_tol=1e-5, abs_tol=1e-7 * peak), step
    if warmup:
        assert math.isclose(rate_at(config, steps_per_epoch, warmup - 1), peak * (warmup - 1) / warmup, rel_tol=1e-5)
    assert 0 < expected_rate(config, steps_per_epoch, total - 1) < 1e-6 * peak


def test_the_papers_rate_is_a_tenth_and_scales_with_the_batch():
    paper = PRESETS["imagenet_120"].optimizer
    assert (paper.batch_size, paper.epochs, paper.momentum, paper.weight_decay) == (256, 120, 0.9, 1e-4)
    assert rate_at(paper, 5004, 0) == pytest.approx(0.1)
    assert rate_at(dataclasses.replace(paper, batch_size=512), 2502, 0) == pytest.approx(0.2)
    assert rate_at(paper, 5004, 60 * 5004) == pytest.approx(0.05)
