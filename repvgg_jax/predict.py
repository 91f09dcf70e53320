"""Classification of images: `python -m repvgg_jax predict WEIGHTS IMAGE…`. Results are written batch by batch."""

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import tyro

from .errors import ConfigError, DataError, WeightsError
from .image_files import some_image_files
from .inference.planned_net import Output
from .inference.predictor import Predictor, make_predictor
from .paths import is_folder
from .prediction_files import Format, Guess, check_embedding_file, embedding_writer, prediction_writer
from .preprocess import Preprocessing, normalize, open_as_input
from .quantization import load_quantized
from .weights import WeightsInfo, WeightsWarning, inspect_weights, load_weights
from .weights.argument import weights_path
from .weights.imagenet_classes import class_names_to_show
from .weights.options import WeightsOptions

WEIGHTS_HELP = (
    "Weight file (training form, deploy form or INT8), or the name of a variant, such as RepVGG-A0, to use its "
    "ImageNet weights. A file of that name takes precedence."
)


@dataclasses.dataclass(frozen=True)
class Predict:
    """Print the most likely classes of images.

    Images are rotated upright according to their EXIF orientation. Files that cannot be read are reported on stderr and
    skipped; the exit status is then 1.
    """

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS", help=WEIGHTS_HELP)]
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[IMAGE ...]")]
    """Image files or folders. Folders are searched recursively."""
    top: int = 5
    """Number of most likely classes to print per image."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """Number of images to read and process at a time."""
    format: Format = "text"
    """Output format. text: one line per image. csv: one row per image and class. json: one JSON object per image."""
    embeddings: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the pooled features to this .npy or .csv file instead of classifying. The image of each row is printed."""
    options: Annotated[tyro.conf.OmitArgPrefixes[WeightsOptions], tyro.conf.arg(name="weight-file")] = (
        dataclasses.field(default_factory=WeightsOptions)
    )


def predict(arguments: Predict) -> int:
    """Print predictions, or write embeddings, batch by batch.

    Returns:
      Number of images (or folders) that could not be read. Each has been reported on stderr.

    Raises:
      ConfigError: an option is out of range, or options contradict each other.
      WeightsError: the weight file cannot be read or used.
      DataError: there are no images, or none that can be read.
      RepVGGError: the embeddings file cannot be written.
    """
    for option, value in (("--top", arguments.top), ("--batch-size", arguments.batch_size)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}")
    if arguments.embeddings is not None:
        check_embedding_file(arguments.embeddings)
        if arguments.format != "text":
            raise ConfigError("--embeddings writes no predictions: remove --format")
    arguments = dataclasses.replace(arguments, weights=weights_path("WEIGHTS", arguments.weights))
    info = arguments.options.apply(inspect_weights(arguments.weights, **arguments.options.reading))
    if info.in_channels != info.preprocessing.channels:
        raise WeightsError(f"{arguments.weights} takes {info.in_channels} channels; image files have 1 or 3")
    reader = ImageReader(arguments.images, info.preprocessing)
    output: Output = "logits" if arguments.embeddings is None else "embedding"
    outputs = _outputs(arguments, info, reader, output)
    if arguments.embeddings is None:
        _print_predictions(arguments, info, outputs)
    else:
        with embedding_writer(arguments.embeddings) as write:
            for names, rows in outputs:
                write(names, rows)
                print(*names, sep="\n", flush=True)
    return reader.failures


def _outputs(
    arguments: Predict, info: WeightsInfo, reader: "ImageReader", output: Output
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield image names and the net's outputs for them, float32 `[N, outputs]`, batch by batch."""
    predictor = None
    for names, pixels in reader.batches(arguments.batch_size):
        if predictor is None:  # not earlier, because there may be no image that can be read
            predictor = _predictor(arguments, info, len(names), output)
        rows = predictor(normalize(pixels, info.preprocessing))
        finite = np.flatnonzero(np.isfinite(rows).all(1)).tolist()
        for index in sorted(set(range(len(names))) - set(finite)):
            reader.fail(f"{names[index]}: the net's outputs are not finite numbers")
        yield [names[index] for index in finite], rows[finite]


def _print_predictions(arguments: Predict, info: WeightsInfo, outputs: Iterator[tuple[list[str], np.ndarray]]) -> None:
    write, class_names = None, class_names_to_show(info)
    for names, logits in outputs:
        write = write or prediction_writer(arguments.format, sys.stdout)
        for name, row in zip(names, softmax(logits), strict=True):
            best = np.argsort(-row, kind="stable")[: arguments.top].tolist()
            write(name, [Guess(i, class_names[i] if class_names else None, float(row[i])) for i in best])
        sys.stdout.flush()


class ImageReader:
    """Reads image files one after another, and reports on stderr those that it cannot read.

    Args:
      paths: image files, or folders that are searched for images recursively.
      preprocessing: preprocessing of the images.
      at_most: largest number of images to read, evenly spaced in the list of all images; None for all.

    Attributes:
      failures: number of files or folders that could not be read so far.
      listed: number of image files from which `at_most` were chosen; 0 until they are chosen, or if `at_most` is None.
    """

    def __init__(self, paths: tuple[str, ...], preprocessing: Preprocessing, at_most: int | None = None):
        self.failures = self.listed = 0
        self._paths, self._preprocessing, self._at_most = paths, preprocessing, at_most
        self._alone = len(paths) == 1 and not is_folder(paths[0])

    def batches(self, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield names and pixels (uint8 `[N, H, W, C]`) of the readable images, `size` at a time.

        Raises:
          DataError: no image can be read.
        """
        if not self._paths:
            raise DataError("no images given: name at least one image file or folder")
        names: list[str] = []
        pixels: list[np.ndarray] = []
        readable = False
        for path in self._files():
            try:
                pixels.append(open_as_input(path, self._preprocessing, exif=True))
            except DataError as error:
                if self._alone:
                    raise
                self.fail(f"{error}")
                continue
            readable = True
            names.append(path)
            if len(names) == size:
                yield names, np.stack(pixels)
                names, pixels = [], []
        if names:
            yield names, np.stack(pixels)
        if not readable:
            raise DataError(f"none of the {self.failures} images and folders could be read")

    def _files(self) -> Iterator[str]:
        if self._at_most is None:
            return self._all_files()
        files = list(self._all_files())
        self.listed, count = len(files), min(self._at_most, len(files))
        return (files[index * len(files) // count] for index in range(count))

    def _all_files(self) -> Iterator[str]:
        for path in self._paths:
            if not is_folder(path):
                yield path
                continue
            try:
                yield from some_image_files(path)
            except DataError as error:
                self.fail(f"{error}")

    def fail(self, reason: str) -> None:
        """Report on stderr an image or folder that could not be read or used, and count it."""
        self.failures += 1
        print(f"error: {reason}", file=sys.stderr, flush=True)


def _predictor(arguments: Predict, info: WeightsInfo, batch_size: int, output: Output) -> Predictor:
    size = info.preprocessing.image_size
    if info.quantized:
        return make_predictor(load_quantized(arguments.weights), None, batch_size, size, output=output)
    with warnings.catch_warnings():
        headless = output == "embedding" and not info.num_classes
        if headless:  # the classifier is not used: do not warn that it is newly initialised
            warnings.simplefilter("ignore", WeightsWarning)
        model, variables = load_weights(
            arguments.weights, num_classes=1 if headless else None, **arguments.options.reading
        )
    return make_predictor(model, variables, batch_size, size, output=output)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return class probabilities, float64 `[N, classes]`."""
    exponentials = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
