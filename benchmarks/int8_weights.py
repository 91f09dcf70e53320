"""Plot fused weights before and after equalisation: `python -m benchmarks.int8_weights WEIGHTS OUT.png`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import tyro

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.files import atomic_path
from repvgg_jax.quantization.equalize import equalize_weights, output_ranges
from repvgg_jax.quantization.quantizer import WEIGHT_LEVELS
from repvgg_jax.quantization.stack import Layers, layers_of


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plot the ranges of all channels of all layers, before and after equalisation."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """Weight file in training or deploy form."""
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Picture to write: .png or .svg."""


def draw(before: Layers, after: Layers, path: Path) -> None:
    """Draw one point per channel, at its largest weight, and one line per layer, below which one scale gives zeros."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for side, layers, title in zip(axes, (before, after), ("fused", "equalised"), strict=True):
        for place, layer in enumerate(layers.values()):
            ranges = output_ranges(layer["kernel"])
            shown = ranges[ranges > 0]
            side.scatter(np.full(len(shown), place), shown, s=6, alpha=0.35, color="tab:blue", linewidths=0)
            lost = ranges.max() / WEIGHT_LEVELS / 2
            side.plot([place - 0.4, place + 0.4], [lost, lost], color="tab:red", linewidth=1.5)
        side.set_yscale("log")
        side.set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=7)
        side.set_title(title)
        side.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("largest weight of an output channel")
    axes[1].plot([], [], color="tab:red", label="with one scale for the layer, smaller weights become 0")
    axes[1].legend(loc="upper right", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m benchmarks.int8_weights")
    model, variables = rv.load_weights(arguments.weights)
    if not model.deploy:
        model, variables = rv.to_deploy(model, variables)
    layers = layers_of(variables["params"])
    draw(layers, equalize_weights(model.variant, layers), Path(arguments.output))


if __name__ == "__main__":
    run_command(main)
