"""Experiments on CIFAR-10: `python -m examples.cifar10 nets DATA` or `python -m examples.cifar10 blocks DATA`.

`nets` measures the accuracy of the preset and of net sizes published by others. `blocks` trains one small net with and
without the branches of its block (the paper's Table 6), and with other blocks, on several seeds. DATA is a folder with
train/CLASS/* and val/CLASS/*, or `cifar10` for the data set that TFDS has prepared. Runs are kept in the workdir.
Running the same command again resumes them and prints the results.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.cifar10")

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from matplotlib.figure import Figure

from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
from repvgg_jax.errors import ConfigError
from repvgg_jax.files import atomic_path
from repvgg_jax.net.summary import summarize
from train.cluster import stop_signal
from train.main import train
from train.metrics import read_rows
from train.presets import parse
from train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Trial:
    """The preset `cifar10` with some of its options changed.

    Attributes:
      name: name in tables.
      options: command-line options of `train.main`.
      published: error in per cent that others report for this architecture with their own recipe.
    """

    name: str
    options: str = ""
    published: float | None = None

    def recipe(self, arguments: "Arguments", seed: int) -> Recipe:
        """Return the recipe for this trial and seed."""
        words = [*self.options.split(), "--data", arguments.data, "--seed", str(seed)]
        if arguments.data_dir is not None:
            words += ["--data-dir", arguments.data_dir]
        if arguments.epochs is not None:
            words += ["--epochs", str(arguments.epochs)]
        folder = (
            Path(arguments.workdir) / arguments.experiment / f"{self.name.replace(' ', '-').replace(',', '')}-{seed}"
        )
        return parse(["--preset", "cifar10", *words, "--workdir", str(folder)])


PLAIN = "--auto-augment none --random-erasing 0"
"""Crops and flips alone, which suit short runs; the preset's augmentation is for its own length."""


def published(blocks: str, widths: str, error: float, name: str) -> Trial:
    """Return the trial for a net of github.com/fattorib/RepVGG-CIFAR10, where it was trained for 200 to 250 epochs."""
    return Trial(name, f"{PLAIN} --num-blocks {blocks} --widths {widths}", error)


SHORT = f"{PLAIN} --epochs 8 --warmup-epochs 1 --num-blocks 2 3 6 1 --widths 16 16 32 64 160 --strides 1 2 2 2 1"
"""A net of 13 convolutions; an epoch takes half a minute on two cores."""

EXPERIMENTS: dict[str, tuple[Trial, ...]] = {
    "nets": (
        Trial("preset"),
        published("2 4 14 1", "12 12 24 48 160", 10.23, "A0"),
        published("2 4 14 1", "16 16 32 64 160", 8.44, "A1"),
        published("2 4 14 1", "16 24 48 96 176", 7.71, "A2"),
        published("4 6 16 1", "16 16 32 64 160", 7.73, "B0"),
        published("4 6 16 1", "16 32 64 128 256", 6.43, "B1"),
        published("4 6 16 1", "16 40 80 160 320", 5.20, "B2"),
        published("4 6 16 1", "16 48 96 192 320", 4.96, "B3"),
    ),
    "blocks": (
        Trial("3x3 alone", f"{SHORT} --no-point --no-identity"),
        Trial("3x3, identity", f"{SHORT} --no-point"),
        Trial("3x3, 1x1", f"{SHORT} --no-identity"),
        Trial("3x3, 1x1, identity", SHORT),
        Trial("QARepVGG", f"{SHORT} --block qarepvgg"),
        Trial("MobileOne, 3 copies", f"{SHORT} --dense-copies 3"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train nets on CIFAR-10 and compare them."""

    experiment: tyro.conf.Positional[Literal["nets", "blocks"]]
    """nets: the preset and published net sizes. blocks: ablation of the block's branches, and other blocks."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder with train/CLASS/* and val/CLASS/*, or cifar10 for the data set as prepared by TFDS."""
    workdir: str = "runs/cifar10"
    """Folder for runs and results."""
    data_dir: str | None = None
    """Folder of the TFDS data sets. Default: $TFDS_DATA_DIR, or ~/tensorflow_datasets if that is not set."""
    seeds: int | None = None
    """Number of runs per trial, each with its own seed. Default: 1 for nets and 3 for blocks."""
    epochs: int | None = None
    """Number of epochs per run. Default: depends on the trial."""
    only: tuple[str, ...] = ()
    """Names of the trials to run, such as A0. Default: all trials."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of a trial: parameters in deploy form, and the fused net's error in per cent for each seed."""

    trial: Trial
    params: int
    epochs: int
    errors: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else 0.0

    def row(self) -> str:
        """Return the outcome as a row of the table."""
        mean = f"{statistics.mean(self.errors):.2f}"
        if len(self.errors) > 1:
            mean += f" ± {self.spread:.2f}"
        others = "" if self.trial.published is None else f"{self.trial.published:.2f}"
        return f"| {self.trial.name} | {self.params / 1e6:.3f} | {self.epochs} | {mean} | {others} |"


HEADER = "| trial | deploy parameters, M | epochs | error, % | published, % |\n|---|---|---|---|---|"


def finished_error(folder: Path) -> float | None:
    """Return the fused net's error in per cent on the whole test split; None if the run has not finished."""
    accuracies = [row["top1"] for row in read_rows(folder / "metrics.jsonl") if row.get("form") == "deploy"]
    return 100 * (1 - accuracies[-1]) if accuracies else None


def outcome(trial: Trial, arguments: Arguments, seeds: int) -> Outcome:
    """Run a trial, training only with the seeds that have not finished; exit if a signal stops the training.

    Raises:
      RepVGGError: the data cannot be read, or the workdir cannot be used.
    """
    errors = []
    recipe = trial.recipe(arguments, 0)
    for seed in range(seeds):
        recipe = trial.recipe(arguments, seed)
        error = finished_error(Path(recipe.run.workdir))
        if error is None:
            result = train(recipe)
            if result is None:
                sys.exit(128 + stop_signal())
            error = 100 * (1 - result.evaluations["deploy"].top1)
        errors.append(error)
    params = summarize(recipe.model.variant, num_classes=10, image_size=32).params
    return Outcome(trial, params, recipe.optimizer.epochs, tuple(errors))


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a plot of the errors: a dot per seed, a bar at the mean, and a cross at the published value."""
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(outcomes)), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(reversed(outcomes)):
        axes.plot(one.errors, [place] * len(one.errors), "o", color="tab:blue", alpha=0.6)
        axes.plot([statistics.mean(one.errors)], [place], "|", color="black", markersize=18)
        if one.trial.published is not None:
            axes.plot([one.trial.published], [place], "x", color="tab:orange")
    axes.set_yticks(range(len(outcomes)), [one.trial.name for one in reversed(outcomes)])
    axes.set_xlabel("test error, %")
    axes.grid(axis="x", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def run(arguments: Arguments) -> list[Outcome]:
    """Run an experiment, print its table, and write it to the workdir as JSON and as a plot.

    Raises:
      ConfigError: there is no trial of that name, or the number of seeds is not positive.
      RepVGGError: the data cannot be read, or the workdir cannot be used.
    """
    trials = {trial.name: trial for trial in EXPERIMENTS[arguments.experiment]}
    for name in arguments.only:
        if name not in trials:
            raise ConfigError(f"--only {name} is not one of {', '.join(trials)}")
    seeds = arguments.seeds if arguments.seeds is not None else {"nets": 1, "blocks": 3}[arguments.experiment]
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {seeds}")
    chosen = [trials[name] for name in arguments.only or trials]
    outcomes = [outcome(trial, arguments, seeds) for trial in chosen]
    print(HEADER, *(one.row() for one in outcomes), sep="\n")
    target = Path(arguments.workdir) / arguments.experiment
    draw(outcomes, target.with_suffix(".png"))
    rows = [
        {"trial": one.trial.name, "params": one.params, "epochs": one.epochs, "errors": one.errors} for one in outcomes
    ]
    with atomic_path(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return outcomes


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m examples.cifar10", registry=plain_help())
    run(arguments)
