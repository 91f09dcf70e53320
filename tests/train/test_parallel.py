"""Claim: on four devices, gradients are averaged, all have the same weights, and every test image counts once.

Four virtual CPU devices (`conftest.py`).
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing, normalize
from tests.helpers.batches import Numbers, numbers
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import compiled, run
from tests.helpers.random_weights import random_variables
from train.data import Example, eval_batches
from train.evaluate import Evaluator
from train.optimizer import learning_rate_schedule, make_optimizer
from train.parallel import AXIS, gather_to_host, mean_over_devices, parallel, per_device_batch, replicate, to_host
from train.recipe import OptimizerOptions
from train.state import TrainState
from train.step import make_train_step

DEVICES, CLASSES = 4, 3
# No mean, and a power of two: these give the same numbers whatever they are compiled with.
PREPROCESSING = Preprocessing(16, 1.0, mean=(0.0, 0.0, 0.0), std=(0.25, 0.25, 0.25))
VARIANT = rv.Variant((1, 2, 1, 1), (4, 4, 8, 8, 8))

assert jax.local_device_count() == DEVICES, "conftest.py asks for four virtual devices"


def random_batch(seed: int, per_device: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (DEVICES, per_device, 16, 16, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, CLASSES, (DEVICES, per_device), np.int32)}


def new_state(model: rv.RepVGG, optimizer: optax.GradientTransformation, dtype: Any = np.float32) -> TrainState:
    variables = random_variables(model, dtype=dtype)
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))


def device_copies(tree: Any) -> list[Any]:
    """Return a tree with a leading axis of devices as one tree per device."""
    host = jax.device_get(tree)
    return [jax.tree.map(lambda leaf, number=number: leaf[number], host) for number in range(DEVICES)]


def keep_gradient() -> optax.GradientTransformation:
    """Return a stand-in for an optimizer: its state is the last gradient, and the weights stay."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def largest(expected: Any, actual: Any) -> float:
    """Return the largest relative difference of any leaf."""
    return max(jax.tree.leaves(jax.tree.map(relative_difference, expected, actual)))


def test_gradients_and_metrics_are_means_over_the_devices():
    with jax.enable_x64(True):
        model = rv.create_model(VARIANT, CLASSES, dtype=jnp.float64, param_dtype=jnp.float64)
        optimizer, schedule = keep_gradient(), optax.constant_schedule(0.1)
        state, batch = new_state(model, optimizer, np.float64), random_batch(0)
        options: dict[str, Any] = dict(label_smoothing=0.1)
        together = parallel(
            make_train_step(model, optimizer, schedule, PREPROCESSING, axis_name=AXIS, **options), donate=True
        )
        new, metrics = together(replicate(state), batch)

        alone = make_train_step(model, optimizer, schedule, PREPROCESSING, **options)
        shares = device_copies(batch)
        alone = compiled(alone, state, shares[0])
        results = [alone(state, share) for share in shares]

    gradients = [result.opt_state for result, _ in results]
    assert largest(gradients[0], gradients[1]) > 0.1, "the devices must differ"
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)
    for gradient in device_copies(new.opt_state):
        assert largest(mean, gradient) <= 1e-10
    for name in ("loss", "top1"):
        expected = np.mean([single[name] for _, single in results])
        np.testing.assert_allclose(np.asarray(metrics[name]), [expected] * DEVICES, rtol=1e-12)
    for (result, _), stats in zip(results, device_copies(new.batch_stats), strict=True):
        assert largest(result.batch_stats, stats) <= 1e-12, "each device keeps the statistics of its own share"


def test_weights_stay_identical_while_statistics_differ_until_averaged(caplog):
    config = OptimizerOptions(epochs=1, batch_size=12, learning_rate=2.0, warmup_epochs=0.2)
    schedule = learning_rate_schedule(config, 5)
    optimizer, model = make_optimizer(config, schedule), rv.create_model(VARIANT, CLASSES)
    start = new_state(model, optimizer)
    step = parallel(make_train_step(model, optimizer, schedule, PREPROCESSING, axis_name=AXIS), donate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # from JAX, Flax and optax, in anything that the step calls
        state, _ = step(replicate(start), random_batch(0))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for seed in range(1, 5):
            state, _ = step(state, random_batch(seed))
    again = [message[:60] for message in caplog.messages]
    assert not again, "compiled again: a step returns a state with another layout than the replicated one"

    copies = device_copies(state)
    assert largest(start.params, copies[0].params) > 0.01, "nothing was learned"
    for other in copies[1:]:
        same = (copies[0].params, copies[0].opt_state, copies[0].step)
        jax.tree.map(np.testing.assert_array_equal, same, (other.params, other.opt_state, other.step))
        differences = jax.tree.map(relative_difference, copies[0].batch_stats, other.batch_stats)
        assert min(jax.tree.leaves(differences)) > 1e-3

    averaged = mean_over_devices(state.batch_stats)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(copy.batch_stats for copy in copies))
    for copy in device_copies(averaged):
        assert largest(mean, copy) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, to_host(averaged), device_copies(averaged)[0])
    every = gather_to_host(state.batch_stats)
    for number, copy in enumerate(copies):
        jax.tree.map(
            np.testing.assert_array_equal, copy.batch_stats, jax.tree.map(lambda leaf, n=number: leaf[n], every)
        )
    assert int(to_host(state.step)) == 5


class Photos:
    """A source of random images with random labels; some are unreadable."""

    def __init__(self, length: int, unreadable: Sequence[int] = ()) -> None:
        rng = np.random.default_rng(length)
        self.images = rng.integers(0, 256, (length, 16, 16, 3), np.uint8)
        self.labels = rng.integers(0, CLASSES, length)
        self.unreadable = unreadable
        self.class_names = [f"class {label}" for label in range(CLASSES)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Example:
        if index in self.unreadable:
            raise rv.DataError(f"image {index} cannot be read")
        return Example(self.images[index], int(self.labels[index]), f"image {index}")


def evaluate_all(model: rv.RepVGG, variables: Any, source: Photos) -> dict[str, Any]:
    """Return the expected result of an evaluation: all readable images at once, on one device, without padding."""
    readable = [index for index in range(len(source)) if index not in source.unreadable]
    logits = np.asarray(run(model.apply, variables, normalize(source.images[readable], PREPROCESSING)), np.float64)
    labels = source.labels[readable]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return {
        "predictions": logits.argmax(-1),
        "top1": np.mean(logits.argmax(-1) == labels),
        "loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
    }


@pytest.mark.parametrize(
    "unreadable", [pytest.param((), marks=pytest.mark.slow), (2, 7)], ids=["all readable", "two unreadable"]
)
def test_evaluation_counts_every_image_once(unreadable):
    """For any number of images and any batch size, also one that the devices do not divide."""
    model = rv.create_model(VARIANT, CLASSES)
    variables = random_variables(model)
    replicated = replicate(variables)
    for length in (9, 16) if unreadable else (3, 8, 9):
        source = Photos(length, unreadable)
        expected = evaluate_all(model, variables, source)
        evaluator = Evaluator(model, source, PREPROCESSING, batch_size=7, workers=1)  # 7 becomes 8
        for result in (evaluator(replicated), evaluator(replicated)):
            assert result.images == length - len(unreadable)
            assert result.skipped == len(unreadable)
            np.testing.assert_array_equal(result.predictions, expected["predictions"])
            assert result.top1 == pytest.approx(expected["top1"])
            assert result.top5 == 1.0, "there are only three classes"
            assert result.loss == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 23])
def test_padding_is_masked_on_every_device(length):
    source = Numbers(length)
    with eval_batches(
        source, batch_size=8, local_device_count=DEVICES, preprocessing=Preprocessing(4, 1.0)
    ) as iterator:
        batches = list(iterator)
    assert all(batch["image"].shape == (DEVICES, 2, 4, 4, 3) for batch in batches)
    masks = np.concatenate([batch["mask"].reshape(-1) for batch in batches])
    assert [number for number, counts in zip(numbers(batches), masks, strict=True) if counts] == list(range(length))


def test_an_indivisible_batch_size_is_refused_with_a_divisible_one():
    assert per_device_batch(8) == 2
    for size in (1, 3, 6, 7, 255, 257):
        with pytest.raises(rv.ConfigError, match=rf"--batch-size {size} .* {DEVICES} devices; (\d+) is$") as caught:
            per_device_batch(size)
        named = int(str(caught.value).split()[-2])
        assert per_device_batch(named) >= 1
        assert abs(named - size) < DEVICES
