"""Commands of the installed package: `python -m repvgg_jax {summary,predict,show} …`."""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from .cli import run_module

    run_module("repvgg_jax.__main__")

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from .command_errors import one_line_errors
from .command_help import plain_help
from .errors import UnknownModelError
from .net.summary import summary_table
from .net.variants import VARIANTS, get_variant
from .paths import in_bucket
from .predict import Predict, predict
from .show.command import Show, show
from .weights import inspect_weights
from .weights.hub import is_hub_address
from .weights.info import describe


@dataclasses.dataclass(frozen=True)
class Summary:
    """Print the size and cost of nets: parameters, FLOPs and Winograd multiplications, next to the published figures.

    For a weight file, also print its preprocessing and classes.
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Names of variants, or weight files. Default: all variants."""
    image_size: Annotated[int | None, tyro.conf.arg(aliases=["-r"])] = None
    """Height and width of the image in pixels. Default: the value in the weight file, or 224 for a variant."""
    num_classes: int | None = None
    """Number of classes. Default: the value in the weight file, or 1000 for a variant."""


def summary(arguments: Summary) -> None:
    """Print a table of the named variants, then a description and a table for each weight file.

    Raises:
      UnknownModelError: a name is neither a variant nor a weight file.
      WeightsError: a weight file cannot be read.
      ConfigError: a size is not positive.
    """
    options = {"image_size": arguments.image_size, "num_classes": arguments.num_classes}
    sizes = {name: value for name, value in options.items() if value is not None}
    files = {name: inspect_weights(name) for name in arguments.names if _is_weight_file(name)}
    variants = [get_variant(name) for name in arguments.names if name not in files]
    if variants or not files:
        print(summary_table(variants or list(VARIANTS.values()), **sizes))
    for name, info in files.items():
        of_file = {"image_size": info.preprocessing.image_size, "num_classes": info.num_classes or 1000}
        print(describe(name, info))
        print(summary_table([info.variant], in_channels=info.in_channels, **(of_file | sizes)))


def _is_weight_file(name: str) -> bool:
    """Return whether a name refers to a file, which need not exist, instead of a variant."""
    try:
        get_variant(name)
    except UnknownModelError:
        is_address = is_hub_address(name) or in_bucket(name)
        return is_address or Path(name).suffix != "" or os.path.exists(name)  # noqa: PTH110 (any length)
    return False


def main() -> None:
    """Run the command. Exit status: 0, 1 if an image could not be read, 2 for any other error."""
    with one_line_errors():
        arguments = tyro.extras.subcommand_cli_from_dict(
            {"summary": Summary, "predict": Predict, "show": Show},
            prog="python -m repvgg_jax",
            description="Classify images, and inspect weight files. `--version` alone prints the version.",
            args=sys.argv[1:],
            registry=plain_help(),
        )
    if isinstance(arguments, Summary):
        summary(arguments)
    elif show(arguments) if isinstance(arguments, Show) else predict(arguments):
        sys.exit(1)
