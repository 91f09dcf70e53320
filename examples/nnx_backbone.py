"""RepVGG as the backbone of a Flax NNX model: train with `nnx.Optimizer`, fuse the backbone, deploy in two ways.

`python -m examples.nnx_backbone` trains on scikit-learn's digits for a few dozen steps. The backbone is our linen
module in `nnx.bridge.ToNNX`, and the head is an NNX layer. After training, the backbone's variables are extracted and
fused. The result is deployed as an NNX model in deploy form and as a compiled predictor. Both give the same logits as
the training form. docs/nnx.md describes the pitfalls.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.nnx_backbone")

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from jax.typing import ArrayLike

import repvgg_jax as rv
from repvgg_jax import digits
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.errors import ConfigError

SMALL = rv.Variant(num_blocks=(1, 1, 1, 1), widths=(16, 16, 32, 64, 128))
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
"""Type of NNX variable for each linen collection of a RepVGG."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train an NNX model with a RepVGG backbone on scanned digits, fuse the backbone, and compare the results."""

    steps: int = 60
    """Number of training steps."""
    batch_size: int = 32
    """Images per step."""
    seed: int = 0
    """Seed for initialisation and batches."""


class DigitsNet(nnx.Module):
    """Digit classifier: pooled features of a RepVGG, then an NNX linear layer; `[N, H, W, 1] -> [N, 10]`."""

    def __init__(self, backbone: rv.RepVGG, images: ArrayLike, *, rngs: nnx.Rngs):
        # Use the random streams only for initialisation. A ToNNX that stores streams (`rngs=` in its constructor) draws
        # from them in every call, and then cannot be called from a plain `jax.jit`. Only dropout needs that.
        self.backbone = nnx.bridge.ToNNX(backbone)
        # Initialise the whole net, not only `embed`: the predictor needs the classifier, although nothing here uses it.
        self.backbone.lazy_init(images, rngs=rngs)
        self.head = nnx.Linear(backbone.variant.widths[-1], 10, rngs=rngs)

    def __call__(self, images: ArrayLike, train: bool = False) -> jax.Array:
        # Without `mutable`, BatchNorm cannot update its running statistics, and `train=True` is an error.
        mutable = ["batch_stats"] if train else False
        return self.head(self.backbone(images, train, method="embed", mutable=mutable))


def linen_variables(net: nnx.bridge.ToNNX) -> dict[str, Any]:
    """Return the variables of a wrapped linen module in linen's format, `{"params": …, "batch_stats": …}`."""
    return {name: nnx.to_pure_dict(nnx.state(net, kind)) for name, kind in COLLECTIONS.items()}


def put_variables(net: nnx.bridge.ToNNX, variables: Mapping[str, Any]) -> None:
    """Set the variables of a wrapped linen module that is already initialised, for example from a file."""
    for name, tree in variables.items():
        state = nnx.state(net, COLLECTIONS[name])
        nnx.replace_by_pure_dict(state, tree)
        nnx.update(net, state)


def real_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return 1437 training and 360 test images, float32 `[N, 32, 32, 1]`, normalised, with their labels `[N]`."""
    pixels, labels = digits.scans()
    images = ((pixels / 255 - digits.MEAN) / digits.STD).astype(np.float32)
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    test = digits.held_out(labels)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return (images[train], labels[train]), (images[test], labels[test])


@nnx.jit
def train_step(net: DigitsNet, optimizer: nnx.Optimizer, images: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Do one training step and return its loss; weights and running statistics change in place."""

    def loss_of(net: DigitsNet) -> jax.Array:
        logits = net(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradient = nnx.value_and_grad(loss_of)(net)
    optimizer.update(net, gradient)
    return loss


def train(net: DigitsNet, images: np.ndarray, labels: np.ndarray, arguments: Arguments) -> list[float]:
    """Train `net` in place on random batches; return the loss of each step."""
    schedule = optax.cosine_decay_schedule(0.1, arguments.steps)
    optimizer = nnx.Optimizer(net, optax.sgd(schedule, momentum=0.9), wrt=nnx.Param)
    rng, losses = np.random.default_rng(arguments.seed), []
    for step in range(1, arguments.steps + 1):
        chosen = rng.integers(0, len(labels), arguments.batch_size)
        losses.append(float(train_step(net, optimizer, images[chosen], labels[chosen])))
        if step in (1, arguments.steps) or step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses


def deployed(net: DigitsNet, backbone: rv.RepVGG, images: np.ndarray) -> DigitsNet:
    """Return a copy of the net with its backbone fused, also an NNX model; `net` is not changed.

    Args:
      net: trained net.
      backbone: the linen module in it.
      images: a batch of images, of which only the shape is used.
    """
    deploy_backbone, deploy_variables = rv.to_deploy(backbone, linen_variables(net.backbone))
    fused = DigitsNet(deploy_backbone, images, rngs=nnx.Rngs(0))
    put_variables(fused.backbone, deploy_variables)
    nnx.update(fused.head, nnx.state(net.head))
    return fused


def compiled(net: DigitsNet, backbone: rv.RepVGG, image_size: int) -> Callable[[Any], jax.Array]:
    """Return a function from images to logits: a compiled predictor instead of the backbone, then the head of `net`.

    Args:
      net: trained net.
      backbone: the linen module in it, in training form.
      image_size: height and width of the images in pixels.
    """
    variables = linen_variables(net.backbone)
    embed = rv.make_predictor(backbone, variables, batch_size=32, image_size=image_size, output="embedding")
    head = nnx.jit(net.head)
    return lambda images: head(embed.start(images))


def run(arguments: Arguments) -> dict[str, np.ndarray]:
    """Train, fuse and deploy; return the logits `[360, 10]` of the test images for each form.

    Raises:
      ConfigError: the number of steps or the batch size is not positive.
    """
    if min(arguments.steps, arguments.batch_size) < 1:
        raise ConfigError("--steps and --batch-size must be at least 1")
    (images, labels), (test_images, test_labels) = real_digits()
    backbone = rv.create_model(SMALL, num_classes=1)
    net = DigitsNet(backbone, images[:1], rngs=nnx.Rngs(arguments.seed))
    train(net, images, labels, arguments)

    fused = deployed(net, backbone, images[:1])
    predict = compiled(net, backbone, images.shape[1])
    logits = {
        "training form": np.asarray(nnx.jit(net)(test_images)),
        "fused, in NNX": np.asarray(nnx.jit(fused)(test_images)),
        "fused, as a predictor": np.asarray(predict(test_images)),
    }
    expected = logits["training form"]
    for name, ours in logits.items():
        right = int((ours.argmax(-1) == test_labels).sum())
        difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        print(f"{name}: {right} of {len(test_labels)} test digits right, relative difference {difference:.1e}")
    return logits


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m examples.nnx_backbone")
    run(arguments)
