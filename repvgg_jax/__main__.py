"""What an installed package offers on the command line: `python -m repvgg_jax {summary,predict,show} …`."""

if __name__ == "__main__":  # before the imports that take long: see `run_module`
    from .cli import run_module

    run_module("repvgg_jax.__main__")

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

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
    """Print parameters, FLOPs and Winograd multiplications beside the published figures.

    Of a weight file print its preprocessing and its classes too.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Variants or weight files; all variants if none is given."""
    image_size: Annotated[int | None, tyro.conf.arg(aliases=["-r"])] = None
    """Side of the image in pixels; 224, or the weight file's own."""
    num_classes: int | None = None
    """Width of the classifier; 1000, or the weight file's own."""


def summary(arguments: Summary) -> None:
    """Print a table of all named variants, then each weight file.

    Raises:
      UnknownModelError: a name that is neither a variant nor a weight file.
      WeightsError: a weight file that cannot be read.
      ConfigError: a size that is not positive.
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
    """Whether a name means a file, existing or not, and not a variant."""
    try:
        get_variant(name)
    except UnknownModelError:
        is_address = is_hub_address(name) or in_bucket(name)
        return is_address or Path(name).suffix != "" or os.path.exists(name)  # noqa: PTH110 (any length)
    return False


def main() -> None:
    """The command. Exit status: 0, 1 if there was an image that could not be read, 2 for any other error."""
    arguments = tyro.extras.subcommand_cli_from_dict(
        {"summary": Summary, "predict": Predict, "show": Show},
        prog="python -m repvgg_jax",
        description="RepVGG for JAX. --version, alone, prints the version.",
        args=sys.argv[1:],
    )
    if isinstance(arguments, Summary):
        summary(arguments)
    elif show(arguments) if isinstance(arguments, Show) else predict(arguments):
        sys.exit(1)
