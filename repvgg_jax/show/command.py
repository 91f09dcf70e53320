"""Command that writes a report on a weight file: `python -m repvgg_jax show WEIGHTS [IMAGE…]`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import ConfigError, RepVGGError, WeightsError, system_errors
from ..files import atomic_path, check_target
from ..paths import exists, place
from ..predict import WEIGHTS_HELP, ImageReader
from ..weights import inspect_weights
from ..weights.argument import weights_path
from ..weights.options import WeightsOptions
from .collect import Request, collect
from .page import GENERATOR, page

SUFFIXES = (".html", ".htm")


@dataclasses.dataclass(frozen=True)
class Show:
    """Write a report about a weight file as a self-contained HTML page.

    The page shows the net's stages and their costs, the difference between training and deploy form, the ranges of
    weights and activations, the predictions for the images, and the time per layer. If no images are given, random
    noise is used.
    """

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS", help=WEIGHTS_HELP)]
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[IMAGE ...]")] = ()
    """Image files or folders. Folders are searched recursively."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """HTML file to write. Default: the name of the weight file with the suffix .html, in the current folder."""
    max_images: int = 24
    """Maximum number of images to use. If there are more, evenly spaced ones are used."""
    top: int = 5
    """Number of most likely classes to show per image."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """Number of images to process at a time. The algorithm of each layer is chosen for this batch size."""
    measure: bool = False
    """Measure the time of the net and of each layer on this machine instead of estimating it."""
    options: Annotated[tyro.conf.OmitArgPrefixes[WeightsOptions], tyro.conf.arg(name="weight-file")] = (
        dataclasses.field(default_factory=WeightsOptions)
    )


def show(arguments: Show) -> int:
    """Write the page, and print its path.

    Returns:
      Number of images (or folders) that could not be read. Each has been reported on stderr.

    Raises:
      ConfigError: an option is out of range, the output has the wrong suffix, or it exists and `show` did not write it.
      WeightsError: the weight file cannot be read or used.
      DataError: none of the images can be read.
      RepVGGError: the page cannot be written.
    """
    numbers = (("--top", "top"), ("--batch-size", "batch_size"), ("--max-images", "max_images"))
    for option, field in numbers:
        if getattr(arguments, field) < 1:
            raise ConfigError(f"{option} must be at least 1, not {getattr(arguments, field)}")
    output = arguments.output or f"{Path(arguments.weights).stem or 'weights'}.html"
    check_page(output)
    arguments = dataclasses.replace(arguments, weights=weights_path("WEIGHTS", arguments.weights))
    info = arguments.options.apply(inspect_weights(arguments.weights, **arguments.options.reading))
    reader = None
    if arguments.images:
        if info.in_channels != info.preprocessing.channels:
            raise WeightsError(f"{arguments.weights} takes {info.in_channels} channels; image files have 1 or 3")
        reader = ImageReader(arguments.images, info.preprocessing, arguments.max_images)
    request = Request(
        file=arguments.weights,
        info=info,
        reading=arguments.options.reading,
        top=arguments.top,
        batch_size=arguments.batch_size,
        measure=arguments.measure,
    )
    text = page(collect(request, reader))
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(output)
    return reader.failures if reader else 0


def check_page(output: str) -> None:
    """Reject an output path that `show` must not write to.

    Raises:
      ConfigError: the suffix is wrong, or the file exists and was not written by `show`.
      RepVGGError: the file cannot be written, or the existing one cannot be read.
    """
    if Path(output).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output}: the name must end in {' or '.join(SUFFIXES)}")
    check_target(output)
    with system_errors(RepVGGError, f"cannot write {output}"):
        foreign = exists(output) and GENERATOR.encode() not in place(output).read_bytes()[:1000]
    if foreign:
        raise ConfigError(f"{output} exists already and was not written by show: choose another --output")
