"""`python -m repvgg_jax show WEIGHTS [IMAGE…]`: one page of HTML about a weight file."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import ConfigError, RepVGGError, WeightsError, system_errors
from ..files import atomic_path, check_target
from ..paths import exists, place
from ..predict import ImageReader
from ..weights import inspect_weights
from ..weights.argument import weights_path
from ..weights.options import WeightsOptions
from .collect import Request, collect
from .page import GENERATOR, page

SUFFIXES = (".html", ".htm")


@dataclasses.dataclass(frozen=True)
class Show:
    """Write a page about a weight file: one HTML file that needs no network.

    It shows the net's stages and their costs, how far training and deploy form are apart, the ranges of weights and
    activations, what the images are taken for, and the time of each layer. Without images it computes on noise.
    """

    weights: tyro.conf.Positional[str]
    """Weight file: training form, deploy form or INT8."""
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, or folders: all images below them."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """The page; the weight file's name with .html, in the current folder, unless given."""
    max_images: int = 24
    """How many images to take; of more, as many that are spread evenly over them all."""
    top: int = 5
    """How many classes to show for each."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """How many images to compute together, and what the layers are planned for."""
    measure: bool = False
    """Measure how long the net and its layers take on this machine, instead of asking the cost model."""
    options: tyro.conf.OmitArgPrefixes[WeightsOptions] = dataclasses.field(default_factory=WeightsOptions)


def show(arguments: Show) -> int:
    """Write the page, and print its name.

    Returns:
      How many images (or folders) could not be read. Each has been named on stderr.

    Raises:
      ConfigError: options out of range, or an output that is not to be written over.
      WeightsError: a weight file that cannot be read or used.
      DataError: images are given, but none that can be read.
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
    """Fail for a file that is no page and may not become one.

    Raises:
      ConfigError: another suffix, or a file of that name that `show` has not written.
      RepVGGError: it cannot be written, or what is there cannot be read.
    """
    if Path(output).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output}: the name must end in {' or '.join(SUFFIXES)}")
    check_target(output)
    with system_errors(RepVGGError, f"cannot write {output}"):
        foreign = exists(output) and GENERATOR.encode() not in place(output).read_bytes()[:1000]
    if foreign:
        raise ConfigError(f"{output} exists already, and is no page that show has written: choose another --output")
