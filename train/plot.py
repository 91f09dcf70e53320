"""Plot the curves of runs: `python -m train.plot RUN…`."""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("train.plot")

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
from repvgg_jax.errors import ConfigError, DataError, system_errors
from repvgg_jax.files import atomic_path, check_target
from repvgg_jax.paths import Place, option_place

from .metrics import Row, read_rows

FEW = 10
"""With fewer points than this, a line shows each of them."""


def plot_curves(workdirs: Sequence[Place], path: Place) -> Place:
    """Plot loss, accuracy and learning rate by epoch from each `workdir/metrics.jsonl` in one picture.

    Args:
      workdirs: folders of runs; if there are several, folders without a run are skipped with a warning.
      path: the picture; its suffix determines the format, and `.png` is appended if there is none.

    Returns:
      The picture's path.

    Raises:
      DataError: no folder has a metrics.jsonl, or one of them is damaged.
      ConfigError: the suffix is not that of a picture format.
      RepVGGError: the picture cannot be written.
    """
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        suffixes = ", ".join(f".{name}" for name in sorted(formats))
        raise ConfigError(f"{path}: no picture format is called {path.suffix}; choose one of {suffixes}")
    check_target(path)
    runs = _read_runs(workdirs)
    # Not with pyplot, whose backend is the caller's choice.
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    loss, accuracy, rate = panels
    for number, (workdir, rows) in enumerate(runs):
        training = [row for row in rows if "learning_rate" in row]
        tested = [row for row in rows if row.get("form") == "train"]
        averaged = [row for row in rows if row.get("form") == "ema"]
        one = len(runs) == 1
        # One run: training and test in two colours. Several: one colour per run, dots for test.
        color, test_color = ("tab:blue", "tab:orange") if one else (f"C{number}", f"C{number}")
        name = "training (augmented)" if one else workdir.name
        test_name = "test" if one else None
        epochs = [row["epoch"] for row in training]
        line = "." if len(epochs) == 1 else ".-" if len(epochs) < FEW else "-"
        for axes, key, scale in ((loss, "loss", 1), (accuracy, "top1", 100)):
            axes.plot(epochs, [scale * row[key] for row in training], line, label=name, color=color, alpha=0.7)
            points = [(row["epoch"], scale * row[key]) for row in tested]
            axes.plot(*_columns(points), "o-", label=test_name, color=test_color, markersize=4, linewidth=one)
            points = [(row["epoch"], scale * row[key]) for row in averaged]
            if points:
                axes.plot(*_columns(points), "s--", label="test, moving average" if one else None, markersize=4)
        if tested:
            last = tested[-1]
            accuracy.annotate(
                f"{100 * last['top1']:.2f} %",
                (last["epoch"], 100 * last["top1"]),
                xytext=(-4, -14 * (number + 1)),
                textcoords="offset points",
                ha="right",
                color=test_color,
            )
        rate.plot(epochs, [row["learning_rate"] for row in training], line, color="tab:green" if one else color)
    loss.set(title="loss", xlabel="epoch", yscale="log")
    loss.legend(frameon=False)
    accuracy.set(title="top-1 accuracy, %", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=110)
    return path


def _read_runs(workdirs: Sequence[Place]) -> list[tuple[Place, list[Row]]]:
    """Return the folders that hold runs, with their rows.

    Raises:
      DataError: no folder holds a run, or a row lacks one of its numbers.
    """
    with system_errors(DataError, "cannot read a run"):
        is_run = {workdir: (workdir / "metrics.jsonl").is_file() for workdir in workdirs}
    if not any(is_run.values()):
        names = " and ".join(str(workdir) for workdir in workdirs)
        holds = "holds" if len(is_run) == 1 else "hold"
        raise DataError(f"{names} {holds} no metrics.jsonl; give the folder of a run of train.main")
    runs = []
    for workdir in workdirs:
        if not is_run[workdir]:
            _warn(f"{workdir} holds no metrics.jsonl and is skipped")
            continue
        path = workdir / "metrics.jsonl"
        rows = read_rows(path, _warn)
        for row in rows:
            needed = ("epoch", "loss", "top1")
            missing = [name for name in needed if not isinstance(row.get(name), (int, float))]
            if missing:
                raise DataError(f"{path}: the row of step {row['step']} has no number {missing[0]!r}; remove it")
        runs.append((workdir, rows))
    return runs


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plot the loss, accuracy and learning rate of one run, or of several for comparison."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of training runs."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = "curves.png"
    """Picture to write. The suffix sets the format: .png, .pdf, .svg, …"""


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m train.plot", registry=plain_help())
    if not arguments.runs:
        raise DataError("no run given; name the folder of a training run")
    runs = [option_place("RUN", run) for run in arguments.runs]
    print(plot_curves(runs, option_place("--out", arguments.out)))
