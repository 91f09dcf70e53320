"""What an installed package offers on the command line: `python -m repvgg_jax {summary,predict} …`."""

if __name__ == "__main__":  # before the imports that take long: see `run_module`
    from .cli import run_module

    run_module("repvgg_jax.__main__")

import dataclasses
import sys
from typing import Annotated

import numpy as np
import tyro

from .errors import ConfigError, DataError, WeightsError
from .predictor import make_predictor
from .preprocess import eval_transform, normalize, open_image
from .quantization import load_quantized
from .summary import summary_table
from .variants import VARIANTS, get_variant
from .weights import inspect_weights, load_weights


@dataclasses.dataclass(frozen=True)
class Summary:
    """Print parameters, FLOPs and Winograd multiplications beside the published figures."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Variants; all if none is given."""
    image_size: Annotated[int, tyro.conf.arg(aliases=["-r"])] = 224
    num_classes: int = 1000


@dataclasses.dataclass(frozen=True)
class Predict:
    """Print the most likely classes of images."""

    weights: tyro.conf.Positional[str]
    """Weight file, training or deploy form."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files."""
    top: int = 5
    """How many classes to print for each."""


def summary(arguments: Summary) -> None:
    """Raises UnknownModelError for a name that is no variant."""
    variants = [get_variant(name) for name in arguments.names] or list(VARIANTS.values())
    print(summary_table(variants, image_size=arguments.image_size, num_classes=arguments.num_classes))


def predict(arguments: Predict) -> None:
    """Raises WeightsError or DataError for a file that cannot be read or used, before anything is printed."""
    if arguments.top < 1:
        raise ConfigError(f"--top must be at least 1, not {arguments.top}")
    info = inspect_weights(arguments.weights)
    if info.in_channels != info.preprocessing.channels:
        raise WeightsError(f"{arguments.weights} takes {info.in_channels} channels; image files have 1 or 3")
    pixels = []
    for name in arguments.images:
        image = open_image(name, info.in_channels)
        try:
            pixels.append(eval_transform(image, info.preprocessing))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    if not pixels:
        raise DataError("no image given")
    batch_size, size = min(len(pixels), 16), info.preprocessing.image_size
    if info.quantized:
        classify = make_predictor(None, None, batch_size, size, quantized=load_quantized(arguments.weights))
    else:
        classify = make_predictor(*load_weights(arguments.weights), batch_size, size)
    logits = classify(normalize(np.stack(pixels), info.preprocessing))
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for name, row in zip(arguments.images, probabilities, strict=True):
        best = np.argsort(-row)[: arguments.top]
        classes = [info.class_names[i] if info.class_names else f"class {i}" for i in best]
        ranked = ", ".join(f"{label} {100 * row[i]:.1f} %" for label, i in zip(classes, best, strict=True))
        print(f"{name}: {ranked}")


def main() -> None:
    """The command."""
    arguments = tyro.extras.subcommand_cli_from_dict(
        {"summary": Summary, "predict": Predict}, prog="python -m repvgg_jax", args=sys.argv[1:]
    )
    if isinstance(arguments, Summary):
        summary(arguments)
    else:
        predict(arguments)
