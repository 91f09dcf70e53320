"""Claim: a RepVGG inside an NNX model trains, running statistics included, and fusing it does not change the logits."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import repvgg_jax as rv
from examples import nnx_backbone as example
from repvgg_jax.trees import flatten
from tests.helpers.commands import command
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables

ARGUMENTS = example.Arguments(steps=12, batch_size=16)


@pytest.fixture(scope="module")
def digits():
    (images, labels), _ = example.real_digits()
    return images[:64], labels[:64]


@pytest.fixture
def backbone() -> rv.RepVGG:
    return rv.create_model(example.SMALL, num_classes=1)


@pytest.fixture
def net(backbone, digits) -> example.DigitsNet:
    return example.DigitsNet(backbone, digits[0][:1], rngs=nnx.Rngs(0))


def test_training_lowers_the_loss_and_moves_weights_and_statistics(net, digits):
    before = flatten(example.linen_variables(net.backbone))
    images, labels = digits
    losses = example.train(net, images, labels, ARGUMENTS)
    after = flatten(example.linen_variables(net.backbone))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    unmoved = {name for name in before if np.array_equal(before[name], after[name])}
    assert unmoved == {"params/linear/kernel", "params/linear/bias"}, "the backbone's own classifier is unused"


def test_evaluation_does_not_change_the_statistics(net, digits):
    before = flatten(example.linen_variables(net.backbone))
    nnx.jit(net)(digits[0])
    after = flatten(example.linen_variables(net.backbone))
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_step_equals_linens(net, backbone, digits):
    """It has the loss and running statistics of a step of the linen module alone."""
    images, labels = digits
    example.put_variables(net.backbone, random_variables(backbone, in_channels=1))
    variables = example.linen_variables(net.backbone)
    head = nnx.to_pure_dict(nnx.state(net.head))
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    loss = example.train_step(net, optimizer, images, labels)

    embeddings, updates = jax.jit(
        lambda: backbone.apply(variables, images, True, method="embed", mutable=["batch_stats"])
    )()
    logits = embeddings @ head["kernel"] + head["bias"]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert relative_difference(expected, loss) < 1e-5
    ours = flatten(example.linen_variables(net.backbone)["batch_stats"])
    for name, leaf in flatten(updates["batch_stats"]).items():
        assert relative_difference(leaf, ours[name]) < 1e-5, name


@pytest.mark.slow
def test_both_deployments_give_the_logits_of_the_training_form(net, backbone, digits):
    images, _ = digits
    variables = random_variables(backbone, in_channels=1)
    example.put_variables(net.backbone, variables)
    expected = nnx.jit(net)(images)
    assert relative_difference(nnx.jit(net.head)(backbone.apply(variables, images, method="embed")), expected) < 1e-5

    fused = example.deployed(net, backbone, images[:1])
    names = set(flatten(example.linen_variables(fused.backbone)["params"]))
    assert "stage0/rbr_reparam/kernel" in names
    assert not any("rbr_dense" in name for name in names)
    assert not jax.tree.leaves(nnx.state(fused, nnx.BatchStat))
    assert relative_difference(expected, nnx.jit(fused)(images)) < 1e-5
    assert relative_difference(expected, jax.jit(lambda batch: fused(batch))(images)) < 1e-5
    assert relative_difference(expected, example.compiled(net, backbone, 32)(images)) < 1e-5
    assert relative_difference(expected, nnx.jit(net)(images)) == 0, "the net itself is unchanged"


def test_the_command_shows_the_same_logits_three_times():
    done = command("examples.nnx_backbone", "--steps", 2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "relative difference" in line]
    assert [line.partition(":")[0] for line in lines] == ["training form", "fused, in NNX", "fused, as a predictor"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)


def test_zero_steps_are_refused_in_one_line():
    done = command("examples.nnx_backbone", "--steps", 0)
    assert (done.returncode, done.stderr) == (2, "error: --steps and --batch-size must be at least 1\n")
