"""Comparison of the two forms after `python -m train.main --preset digits`, and a picture of the predictions.

`python -m examples.digits RUN` loads both weight files of a run, compares their predictions on every test image, times
both forms, and writes `RUN/predictions.png` and some test digits as images in `RUN/digits/`.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.digits")

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
from repvgg_jax.files import atomic_path
from repvgg_jax.predict import softmax
from repvgg_jax.preprocess import normalize
from train import data

ROUNDS = 30


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare the training form and the deploy form of a run on digits, and draw the predictions."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the training run, which contains final.safetensors and deploy.safetensors."""
    data_dir: str | None = None
    """Folder of the TFDS data sets. Default: $TFDS_DATA_DIR, or ~/tensorflow_datasets if that is not set."""
    batch_size: int = 16
    """Batch size for the timing."""


def test_images(info: rv.WeightsInfo, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return all test digits at the network's input size, uint8 `[N, H, W, 3]`, and their labels `[N]`."""
    dataset = data.open_dataset(
        "digits", image_size=info.preprocessing.image_size, data_dir=data_dir, evaluation_only=True
    )
    with data.eval_batches(
        dataset.test, batch_size=len(dataset.test), local_device_count=1, preprocessing=info.preprocessing
    ) as batches:
        batch = next(batches)  # [devices, N, …]
    return batch["image"][0], batch["label"][0]


def alternating_times(functions: list[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Return each function's median time in seconds; the calls alternate, so that machine load affects all equally."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 2):  # the first two rounds warm up
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def draw(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    """Write a picture of `images` `[N, H, W, 3]`, each with its most likely class, in red if it is wrong."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    grid = figure.subplots(4, 8)
    for axes, image, label, row in zip(grid.flat, images, labels, probabilities, strict=True):
        best = int(row.argmax())
        axes.imshow(image)
        axes.set_title(
            f"{names[best]}  {100 * row[best]:.0f} %", color="black" if best == label else "red", fontsize=10
        )
        axes.axis("off")
    figure.suptitle("test digits and predictions of the fused net")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def compare(arguments: Arguments) -> None:
    """Print the agreement and the latencies of the two forms; write the picture and the images.

    Raises:
      RepVGGError: the run has not finished, or its files cannot be read.
    """
    run = Path(arguments.run)
    info = rv.inspect_weights(run / "final.safetensors")
    images, labels = test_images(info, arguments.data_dir)
    inputs = normalize(images, info.preprocessing)

    trained, trained_variables = rv.load_weights(run / "final.safetensors")
    deployed, deploy_variables = rv.load_weights(run / "deploy.safetensors")
    train_form = jax.jit(lambda batch: trained.apply(trained_variables, batch))
    predict = rv.make_predictor(deployed, deploy_variables, arguments.batch_size, info.preprocessing.image_size)

    logits = np.asarray(train_form(inputs))
    fused_logits = predict(inputs)
    same = int((logits.argmax(-1) == fused_logits.argmax(-1)).sum())
    right = int((fused_logits.argmax(-1) == labels).sum())
    difference = np.linalg.norm(logits - fused_logits) / np.linalg.norm(logits)
    print(f"fused net: {right} of {len(labels)} test digits right ({100 * right / len(labels):.2f} %)")
    print(f"same prediction in both forms: {same} of {len(labels)}; relative difference of logits {difference:.1e}")

    batch = inputs[: arguments.batch_size]
    slow, fast = alternating_times([lambda: train_form(batch), lambda: predict(batch)])
    print(
        f"{len(batch)} images: training form {1e3 * slow:.1f} ms, deploy form {1e3 * fast:.1f} ms, "
        f"{slow / fast:.2f} times as fast"
    )

    shown = np.random.default_rng(0).permutation(len(labels))[:32]
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    draw(images[shown], labels[shown], softmax(fused_logits[shown]), names, run / "predictions.png")
    folder = run / "digits"
    folder.mkdir(exist_ok=True)
    for number in shown[:4]:
        path = folder / f"test-{number:03}-is-{names[labels[number]]}.png"
        with atomic_path(path) as temporary:
            Image.fromarray(images[number]).save(temporary)
    print(f"pictures: {run / 'curves.png'}, {run / 'predictions.png'}; four test digits: {folder}")


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m examples.digits", registry=plain_help())
    compare(arguments)
