"""RepVGG as a dilated backbone: a PSPNet segments coins, then its backbone is fused, and the masks stay the same.

`python -m examples.segmentation` uses the photograph of Greek coins from Pompeii that comes with scikit-image. There
are no hand-drawn masks for it. Instead, the ground truth is computed by a watershed on the image's edges, seeded where
the picture is clearly coin or clearly ground (the classical method for this picture). The network is trained on crops
of the left two thirds and tested on the right third.

Writes `segmentation.png`: input, ground truth, prediction. PSPNet: arXiv 1612.01105.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.segmentation")

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import repvgg_jax as rv
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.errors import ConfigError
from repvgg_jax.files import atomic_path
from repvgg_jax.net.layers import ConvBN

from .digits import alternating_times

BACKBONE = rv.Variant(num_blocks=(1, 2, 4, 2), widths=(16, 32, 48, 64, 128), output_stride=8)
CLASSES = ("ground", "coin")
BINS = (1, 2, 3, 6)
CROP = 96
TRAIN_COLUMNS = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a PSPNet with a RepVGG backbone on a photograph of coins, fuse the backbone, and compare the results."""

    steps: int = 200
    """Number of training steps."""
    batch_size: int = 8
    """Crops per step."""
    out: str = "runs/segmentation"
    """Folder to write the picture to."""
    seed: int = 0
    """Seed for initialisation and crops."""


class PyramidPooling(nn.Module):
    """Averages over 1x1, 2x2, 3x3 and 6x6 regions, which are projected, upsampled and concatenated with the input."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _, height, width, channels = x.shape
        levels = [x]
        for bins in BINS:
            pooled = region_means(x, bins)
            projected = nn.relu(ConvBN(channels // len(BINS), 1, name=f"level{bins}")(pooled, train))
            levels.append(jax.image.resize(projected, (len(x), height, width, projected.shape[3]), "bilinear"))
        return jnp.concatenate(levels, axis=3)


def region_means(x: jax.Array, bins: int) -> jax.Array:
    """Average over regions: `[N, H, W, C] -> [N, bins, bins, C]` for any H and W (`torch.nn.AdaptiveAvgPool2d`)."""
    rows, columns = (region_weights(size, bins) for size in x.shape[1:3])
    return jnp.einsum("rh,nhwc,sw->nrsc", rows, x, columns)


def region_weights(size: int, bins: int) -> np.ndarray:
    """Return each pixel's weight in each region, `[bins, size]`; regions overlap if `bins` does not divide `size`."""
    weights = np.zeros((bins, size), np.float32)
    for region in range(bins):
        start, stop = region * size // bins, -(-(region + 1) * size // bins)
        weights[region, start:stop] = 1 / (stop - start)
    return weights


class PSPNet(nn.Module):
    """PSPNet with class scores for every pixel, `[N, H, W, 1] -> [N, H, W, classes]`."""

    deploy: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        backbone = rv.create_model(BACKBONE, deploy=self.deploy, name="backbone")
        x = backbone.features(images, train)["stage4"]  # an eighth of the image's height and width
        x = PyramidPooling(name="pyramid")(x, train)
        x = nn.relu(ConvBN(64, 3, name="neck")(x, train))
        x = nn.Conv(len(CLASSES), (1, 1), name="head")(x)
        return jax.image.resize(x, (*images.shape[:3], len(CLASSES)), "bilinear")


def coins() -> tuple[np.ndarray, np.ndarray]:
    """Return the normalised photograph, `[303, 384, 1]`, and the class of every pixel, `[303, 384]`."""
    from skimage import data, filters, segmentation

    pixels = data.coins()
    seeds = np.select([pixels < 30, pixels > 150], [1, 2], 0)
    mask = segmentation.watershed(filters.sobel(pixels), seeds) - 1
    image = pixels.astype(np.float32)
    return ((image - image.mean()) / image.std())[..., None], mask.astype(np.int32)


def random_crops(image: np.ndarray, mask: np.ndarray, count: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return square crops with random rotation, mirroring, contrast and brightness, and their masks.

    Shapes: `[count, CROP, CROP, 1]` and `[count, CROP, CROP]`.
    """
    images, masks = [], []
    for _ in range(count):
        top, left = (rng.integers(0, size - CROP + 1) for size in mask.shape)
        window = np.s_[top : top + CROP, left : left + CROP]
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        pair = [np.rot90(a[window], turns) for a in (image, mask)]
        crop, truth = (a[:, ::-1] if mirrored else a for a in pair)
        images.append(crop * rng.uniform(0.8, 1.25) + rng.uniform(-0.2, 0.2))
        masks.append(truth)
    return np.stack(images).astype(np.float32), np.stack(masks)


def train(arguments: Arguments, image: np.ndarray, mask: np.ndarray) -> Any:
    """Train a PSPNet on crops of `image`, printing the loss at intervals; return its variables."""
    net, rng = PSPNet(), np.random.default_rng(arguments.seed)
    variables = jax.jit(net.init)(jax.random.key(arguments.seed), jnp.zeros((1, CROP, CROP, 1)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, arguments.steps), weight_decay=1e-4)

    @jax.jit
    def step(variables: Any, opt_state: Any, images: jax.Array, masks: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            tree = {**variables, "params": params}
            scores, changed = net.apply(tree, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(scores, masks).mean(), changed

        (loss, changed), gradient = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradient, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **changed}, opt_state, loss

    opt_state = optimizer.init(variables["params"])
    for number in range(1, arguments.steps + 1):
        crops = random_crops(image, mask, arguments.batch_size, rng)
        variables, opt_state, loss = step(variables, opt_state, *crops)
        if number in (1, arguments.steps) or number % 50 == 0:
            print(f"step {number}: loss {float(loss):.3f}", flush=True)
    return variables


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Return the intersection over union, averaged over the classes."""
    both = [(predicted == c, truth == c) for c in range(len(CLASSES))]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in both]))


def draw(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Write a picture of input, ground truth and prediction side by side."""
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = (("input", image), ("truth (watershed)", truth), ("prediction, fused backbone", predicted))
    for axes, (title, pixels) in zip(panels, shown, strict=True):
        axes.imshow(pixels, cmap="gray")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def run(arguments: Arguments) -> tuple[float, float]:
    """Train, fuse and compare; return the mean IoU before and after fusion.

    Raises:
      ConfigError: the number of steps or the batch size is not positive.
      RepVGGError: the picture cannot be written.
    """
    if min(arguments.steps, arguments.batch_size) < 1:
        raise ConfigError("--steps and --batch-size must be at least 1")
    image, mask = coins()
    variables = train(arguments, image[:, :TRAIN_COLUMNS], mask[:, :TRAIN_COLUMNS])
    test, truth = image[None, :, TRAIN_COLUMNS:], mask[:, TRAIN_COLUMNS:]

    fused = rv.fuse_variables(variables, ("backbone",))  # the pyramid and the head keep their BN
    forms = {"training form": (PSPNet(), variables), "fused backbone": (PSPNet(deploy=True), fused)}
    segment = {name: partial(jax.jit(net.apply), tree, test) for name, (net, tree) in forms.items()}
    masks = {name: np.asarray(scores()).argmax(-1)[0] for name, scores in segment.items()}
    seconds = alternating_times(list(segment.values()), rounds=20)
    scores = [mean_iou(predicted, truth) for predicted in masks.values()]
    for name, score, time in zip(forms, scores, seconds, strict=True):
        print(f"{name}: mean IoU {100 * score:.2f} % on the unseen third, {1e3 * time:.1f} ms")
    before, after = masks.values()
    print(f"same class in both forms: {int((before == after).sum())} of {truth.size} pixels")

    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(test[0, ..., 0], truth, after, folder / "segmentation.png")
    print(f"picture: {folder / 'segmentation.png'}")
    return scores[0], scores[1]


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m examples.segmentation")
    run(arguments)
