"""Train a small net on CIFAR-10 with this library and with PyTorch: `python -m benchmarks.cifar10_pytorch DATA`.

Both start from the same weights and take the same batches (from this library's pipeline, with augmentation) for one
epoch of the preset's recipe, 390 steps. The PyTorch side is the independent implementation that the tests use, with
`torch.optim.SGD` and autograd. Both loss curves are drawn in one picture, and both nets are evaluated on the whole test
split. A second seed, with other weights and another order, shows how much seeds differ. PyTorch trains each seed once
more with every weight changed by a millionth of itself, which shows how much rounding alone changes a run.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("benchmarks.cifar10_pytorch")

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

import repvgg_jax as rv
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.files import atomic_path
from repvgg_jax.preprocess import Preprocessing, normalize
from tests.helpers import torch_oracle
from train import data
from train.loop import make_parallel_step
from train.parallel import put_batch, replicate, to_host
from train.presets import parse
from train.run import Run, fresh_state, make_evaluator, set_up, trained_forms, training_batches

BLOCKS, STRIDES, WIDTHS = (2, 3, 6, 1), (1, 2, 2, 2, 1), (16, 16, 32, 64, 160)
MULTIPLIERS = (0.25, 0.25, 0.25, 0.3125)
"""The same widths as the oracle's multipliers, of 64, 128, 256 and 512 channels."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train the same net on the same batches with this library and with PyTorch."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder with train/CLASS/* and val/CLASS/*, or cifar10 for the data set as prepared by TFDS."""
    seeds: int = 2
    """Number of seeds to train with."""
    epochs: int = 1
    """Passes over the training split."""
    picture: str = "cifar10_pytorch.png"
    """File to write the plot of the loss curves to."""


def prepared_run(arguments: Arguments, seed: int) -> Run:
    """Return a run of the preset's recipe with the small net, all stages of which are trained."""
    words = ["--data", arguments.data, "--epochs", str(arguments.epochs), "--seed", str(seed)]
    for option, numbers in (("--num-blocks", BLOCKS), ("--widths", WIDTHS), ("--strides", STRIDES)):
        words += [option, *map(str, numbers)]
    words += ["--auto-augment", "none", "--random-erasing", "0"]
    words += ["--no-whiten-stem", "--warmup-epochs", "0", "--workdir", tempfile.gettempdir()]
    return set_up(parse(["--preset", "cifar10", *words]))


def train_here(run: Run) -> tuple[list[float], float]:
    """Train with this library; return the loss before each step, and the accuracy at the end."""
    state, step, losses = replicate(fresh_state(run)), make_parallel_step(run), []
    with training_batches(run, 0) as batches:
        for _ in range(run.total_steps):
            state, metrics = step(state, put_batch(next(batches)))
            losses.append(float(to_host(metrics["loss"])))
    return losses, make_evaluator(run, run.model)(trained_forms(state)["train"]).top1


def initial_oracle(run: Run) -> torch_oracle.RepVGG:
    """Return the PyTorch net with the run's initial weights, read from the authors' file format."""
    oracle = torch_oracle.RepVGG(BLOCKS, MULTIPLIERS, 1, run.dataset.num_classes, False, strides=STRIDES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "initial.pth"
        rv.save_weights(path, run.model, fresh_state(run).variables)
        oracle.load_state_dict(torch.load(path))
    return oracle


def torch_images(images: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Convert uint8 `[devices, N, H, W, C]` to PyTorch's normalised `[N, C, H, W]`."""
    flat = images.reshape(-1, *images.shape[2:])
    return torch.from_numpy(np.array(normalize(flat, preprocessing))).permute(0, 3, 1, 2).contiguous()


def train_there(run: Run, change: float = 0.0) -> tuple[list[float], float]:
    """Train with PyTorch, from weights randomly changed by about `change` of their size.

    Returns:
      The loss before each step, and the accuracy at the end.
    """
    oracle, images_of = initial_oracle(run), run.dataset.preprocessing
    generator = torch.Generator().manual_seed(run.recipe.run.seed)
    with torch.no_grad():
        for weight in oracle.parameters():
            weight *= 1 + change * torch.randn(weight.shape, generator=generator)
    options = run.recipe.optimizer

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with training_batches(run, 0) as all_batches:
            for _ in range(run.total_steps):
                batch = next(all_batches)
                yield torch_images(batch["image"], images_of), torch.from_numpy(batch["label"].reshape(-1)).long()

    losses = torch_oracle.sgd_steps(
        oracle,
        batches(),
        [float(np.asarray(run.schedule(step))) for step in range(run.total_steps)],
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        nesterov=options.nesterov,
        label_smoothing=options.label_smoothing,
    )
    oracle.eval()
    right = images = 0.0
    with (
        data.eval_batches(run.dataset.test, batch_size=500, local_device_count=1, preprocessing=images_of) as batched,
        torch.no_grad(),
    ):
        for batch in batched:
            logits = oracle(torch_images(batch["image"], images_of)).numpy()
            mask = batch["mask"].reshape(-1)
            right += float(((logits.argmax(-1) == batch["label"].reshape(-1)) * mask).sum())
            images += float(mask.sum())
    return losses, right / images


SIDES: dict[str, Callable[[Run], tuple[list[float], float]]] = {
    "repvgg-jax": train_here,
    "PyTorch": train_there,
    "PyTorch, weights changed by 1e-6": functools.partial(train_there, change=1e-6),
}


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Write a picture of the loss curves, smoothed over ten steps."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sides = len(SIDES)
    for number, (name, losses) in enumerate(curves.items()):
        smooth = np.convolve(losses, np.full(10, 0.1), "valid")
        axes.plot(smooth, label=name, color=f"C{number // sides}", linestyle=("-", "--", ":")[number % sides])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean over ten steps")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main() -> None:
    """Run the command; the last line on stdout is one JSON object."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m benchmarks.cifar10_pytorch")
    curves, top1 = {}, {}
    for seed in range(arguments.seeds):
        run = prepared_run(arguments, seed)
        for side, train in SIDES.items():
            name = f"{side}, seed {seed}"
            curves[name], top1[name] = train(run)
            print(f"{name}: last losses {np.mean(curves[name][-20:]):.4f}, top-1 {100 * top1[name]:.2f} %", flush=True)
    draw(curves, Path(arguments.picture))
    print(json.dumps({"top1": top1, "steps": len(next(iter(curves.values())))}))
