"""Claim: accumulation, moving averages, clipping and freezing match the same recipes in PyTorch."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing, normalize
from repvgg_jax.trees import flatten
from tests.helpers.random_weights import random_variables
from train.optimizer import frozen_blocks, make_optimizer
from train.recipe import FineTuneOptions, OptimizerOptions
from train.state import TrainState, create_state
from train.step import make_train_step, moving_average, smooth_targets, training_loss

SMALL = rv.Variant((1, 1, 2, 1), (4, 4, 8, 8, 12))
OPTIONS = OptimizerOptions(learning_rate=0.1, weight_decay=1e-2)


def batch_of(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 5, count).astype(np.int32)}


def stepper(
    options: OptimizerOptions = OPTIONS,
    fine_tune: FineTuneOptions | None = None,
    built: Mapping[str, Any] | None = None,
    **more: Any,
):
    """Return a step with a constant learning rate, and a state with random weights to start from."""
    tuning = fine_tune or FineTuneOptions()
    model = rv.create_model(SMALL, 5, frozen_stages=tuning.freeze_stages, frozen_bn=tuning.freeze_bn, **(built or {}))
    schedule = optax.constant_schedule(options.learning_rate)
    frozen = frozen_blocks(SMALL, tuning.freeze_stages)
    optimizer = make_optimizer(options, schedule, head_learning_rate=tuning.head_learning_rate, frozen=frozen)
    start = create_state(
        model, optimizer, 0, (32, 32, 3), ema=bool(more.get("ema_decay")), variables=random_variables(model)
    )
    return jax.jit(make_train_step(model, optimizer, schedule, Preprocessing(32), **more)), start


@functools.cache
def plain_stepper():
    """`stepper()`, compiled once."""
    return stepper()


@jax.jit
def loss_and_gradient(params: Any, stats: Any, batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the loss, its gradient and the new BN statistics, without a train step."""

    def loss_of(params: Any) -> tuple[Any, Any]:
        images, targets = normalize(batch["image"], Preprocessing(32)), smooth_targets(batch["label"], 5)
        logits, changed = rv.create_model(SMALL, 5).apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        return training_loss(logits, targets, auxiliary_weight=0.0), changed["batch_stats"]

    (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, gradient, stats


def changed(before: Any, after: Any) -> set[str]:
    before, after = flatten(before), flatten(after)
    return {name for name, leaf in before.items() if not np.array_equal(leaf, after[name])}


def test_accumulated_gradients_are_the_mean_over_the_portions_and_bn_sees_each_portion():
    batch = batch_of(12)
    step, start = stepper(accumulate=3)
    after, metrics = step(start, batch)

    # By hand: three smaller batches, with BN statistics passed on, and one update with the mean gradient.
    gradients, losses, stats = [], [], start.batch_stats
    for portion in range(3):
        part = {name: value[4 * portion : 4 * portion + 4] for name, value in batch.items()}
        loss, gradient, stats = loss_and_gradient(start.params, stats, part)
        gradients.append(gradient)
        losses.append(loss)
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *gradients)
    optimizer = make_optimizer(OPTIONS, optax.constant_schedule(OPTIONS.learning_rate))
    updates, _ = jax.jit(optimizer.update)(mean, start.opt_state, start.params)
    expected = jax.tree.map(np.add, start.params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), expected, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, after.batch_stats)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    plain, _ = plain_stepper()
    whole, _ = plain(start, batch)
    assert changed(whole.batch_stats, after.batch_stats), "portions and the whole batch have different statistics"


def test_the_moving_average_follows_weights_and_statistics():
    step, state = stepper(ema_decay=0.9)
    expected = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    for number in range(4):
        state, _ = step(state, batch_of(6, number))
        kept = min(0.9, (1 + number) / (10 + number))
        now = jax.device_get(state.variables)
        expected = jax.tree.map(lambda a, b, kept=kept: kept * a + (1 - kept) * b, expected, now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, state.ema_variables)
    assert changed(state.variables, state.ema_variables)


def test_the_moving_averages_decay_grows_to_its_value():
    average, new = jnp.zeros(()), jnp.ones(())
    assert float(moving_average(average, new, 0.999, jnp.array(0))) == pytest.approx(0.9)
    assert float(moving_average(average, new, 0.999, jnp.array(10**6))) == pytest.approx(0.001, rel=1e-3)


def test_clipping_limits_the_step_and_the_log_shows_the_norm_before_it():
    free, start = plain_stepper()
    clipped, clipped_start = stepper(dataclasses.replace(OPTIONS, weight_decay=0.0, clip_norm=0.01))
    after_free, metrics = free(start, batch_of(6))
    after_clipped, clipped_metrics = clipped(clipped_start, batch_of(6))
    assert float(metrics["gradient_norm"]) > 0.1
    np.testing.assert_allclose(metrics["gradient_norm"], clipped_metrics["gradient_norm"], rtol=1e-5)

    def length(after: TrainState) -> float:
        moved = jax.tree.leaves(jax.tree.map(np.subtract, start.params, after.params))
        return float(np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in moved])))

    np.testing.assert_allclose(length(after_clipped), 0.1 * 0.01, rtol=1e-2)
    assert length(after_free) > 10 * length(after_clipped)


def test_frozen_stages_keep_weights_and_statistics_despite_decay():
    step, start = stepper(fine_tune=FineTuneOptions(freeze_stages=2))
    state = start
    for number in range(2):
        state, _ = step(state, batch_of(6, number))
    moved = changed(start.variables, state.variables)
    assert not [name for name in moved if name.split("/")[1].split("_")[0] in ("stage0", "stage1")]
    expected = {
        name
        for name in flatten(start.variables)
        if name.split("/")[1].split("_")[0] in ("stage2", "stage3", "stage4", "linear")
    }
    assert moved == expected


def test_frozen_bn_keeps_statistics_and_trains_the_rest():
    step, start = stepper(fine_tune=FineTuneOptions(freeze_bn=True))
    after, _ = step(start, batch_of(6))
    moved = changed(start.variables, after.variables)
    assert not [name for name in moved if name.startswith("batch_stats")]
    assert moved == {name for name in flatten(start.variables) if name.startswith("params")}


@pytest.mark.parametrize("block", [pytest.param("repvgg", marks=pytest.mark.slow), "qarepvgg"])
def test_every_branch_of_other_blocks_trains_and_the_identitys_constant_does_not(block):
    built = dict(block=block, branches=rv.Branches(2, True, True), activation="silu", dropout=0.5)
    step, start = stepper(built=built, accumulate=2)
    after, _ = step(start, batch_of(8))
    everything, constants = set(flatten(start.variables)), set()
    # A BN removes what the BNs before it add: the gradients of their biases are zero, up to rounding.
    before_bn = ["dbb_1x1_3x3/bn1/bias", "dbb_1x1_avg/bn1/bias"]
    if block == "qarepvgg":
        constants = {"batch_stats/stage3_1/rbr_identity/scale"}
        before_bn += ["rbr_dense/bn/bias", "rbr_dense_1/bn/bias", "dbb_1x1_3x3/bn2/bias", "dbb_1x1_avg/bn2/bias"]
    cancelled = {name for name in everything if name.endswith(tuple(before_bn))}
    assert len(cancelled) == len(before_bn) * len(start.variables["batch_stats"])
    assert {name for name, leaf in flatten(start.variables).items() if np.ndim(leaf) == 0} == constants
    moved = changed(start.variables, after.variables)
    assert moved | cancelled == everything - constants
    again, _ = step(start, batch_of(8))
    assert not changed(after.variables, again.variables), "dropout is a function of the seed and the step"


def test_the_heads_learning_rate_is_multiplied():
    plain, start = plain_stepper()
    faster, faster_start = stepper(fine_tune=FineTuneOptions(head_learning_rate=10))
    one, ten = plain(start, batch_of(6))[0], faster(faster_start, batch_of(6))[0]
    ratio = jax.tree.map(
        lambda s, a, b: np.asarray((b - s) / (a - s)),
        start.params["linear"],
        one.params["linear"],
        ten.params["linear"],
    )
    np.testing.assert_allclose(np.median(ratio["kernel"]), 10, rtol=1e-3)
    np.testing.assert_array_equal(
        one.params["stage4_0"]["rbr_dense"]["conv"]["kernel"], ten.params["stage4_0"]["rbr_dense"]["conv"]["kernel"]
    )
