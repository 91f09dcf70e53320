"""Report on one evaluation: `python -m train.evaluate … --report DIR`.

| file | contents |
|---|---|
| `report.json` | accuracy, figures per class, the most frequent confusions, the most confident mistakes |
| `per_class.csv` | one row per class: images, recall (the class's accuracy), precision, F1 |
| `confusion.csv`, `confusion.png` | counts: one row per true class, one column per predicted class |
| `predictions.csv` | one row per image: name, label, prediction, probability |
| `mistakes.png` | the wrong predictions with the highest probability, with the images as the net sees them |
"""

import csv
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from repvgg_jax.errors import RepVGGError
from repvgg_jax.files import atomic_path, check_target
from repvgg_jax.paths import Place
from repvgg_jax.preprocess import Preprocessing, decode_image, eval_transform, to_mode
from repvgg_jax.storage import BucketPath

from .data import Example, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .evaluate import Evaluation

MISTAKES = 32
"""Number of wrong predictions that are shown."""

CONFUSIONS = 20
"""Number of pairs of classes that are listed."""


class NamedSource:
    """A source that records the names and labels of the images it reads, for a report."""

    def __init__(self, source: Source) -> None:
        self.read: dict[int, tuple[str, int]] = {}
        self._source = source

    @property
    def class_names(self) -> list[str]:
        return self._source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Example:
        example = self._source[index]
        self.read[index] = (example.name, example.label)
        return example


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """Counts of one class, and their ratios, which are None if the denominator is 0."""

    index: int
    name: str
    images: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """Share of the class's images that are predicted correctly: the class's accuracy."""
        return _ratio(self.correct, self.images)

    @property
    def precision(self) -> float | None:
        """Share of the images predicted as this class that belong to it."""
        return _ratio(self.correct, self.predicted)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of recall and precision."""
        return _ratio(2 * self.correct, self.images + self.predicted)

    def row(self) -> dict[str, Any]:
        """Return the figures under their names in the files."""
        counts = {"images": self.images, "predicted": self.predicted, "correct": self.correct}
        ratios = {"recall": self.recall, "precision": self.precision, "f1": self.f1}
        return {"class": self.index, "name": self.name} | counts | ratios


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return counts, int64 `[classes, classes]`: rows are true classes, columns are predicted classes."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def class_figures(confusion: np.ndarray, names: Sequence[str]) -> list[ClassFigures]:
    """Return each class's figures from a confusion matrix."""
    columns = (confusion.sum(1), confusion.sum(0), confusion.diagonal())
    return [ClassFigures(i, name, *(int(column[i]) for column in columns)) for i, name in enumerate(names)]


def check_report_folder(folder: Place) -> None:
    """Check before a long evaluation that `write_report` will be able to write.

    Raises:
      RepVGGError: the folder cannot be created or written to.
      ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib  # noqa: F401

    if isinstance(folder, BucketPath):
        check_target(folder / "report.json")
    elif not folder.is_dir():
        check_target(folder)
        if folder.exists():
            raise RepVGGError(f"cannot write a report to {folder}: it is not a folder")
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise RepVGGError(f"cannot write a report to {folder}: no permission")


def write_report(
    folder: Place,
    evaluation: "Evaluation",
    source: NamedSource,
    preprocessing: Preprocessing,
    about: dict[str, Any],
) -> None:
    """Write all files of a report; those of an earlier report in the folder are replaced.

    Args:
      folder: folder of the report; created if it does not exist.
      evaluation: evaluation of all images of `source`, by one process.
      source: the evaluated source; the images of the worst mistakes are read from it again.
      preprocessing: preparation of its images.
      about: further entries for `report.json`.

    Raises:
      RepVGGError: a file cannot be written.
    """
    names = [_printable(name) for name in source.class_names]
    read = [source.read[index] for index in evaluation.indices.tolist()]
    labels, predictions = np.array([label for _, label in read]), evaluation.predictions
    confusion = confusion_matrix(labels, predictions, len(names))
    figures = class_figures(confusion, names)
    rows = [
        {
            "image": _printable(image),
            "label": int(label),
            "label_name": names[label],
            "prediction": int(prediction),
            "prediction_name": names[prediction],
            "probability": float(f"{probability:.6g}"),
            "correct": int(label == prediction),
        }
        for (image, label), prediction, probability in zip(read, predictions, evaluation.probabilities, strict=True)
    ]
    wrong = np.flatnonzero(labels != predictions)
    worst = wrong[np.argsort(-evaluation.probabilities[wrong], kind="stable")][:MISTAKES].tolist()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RepVGGError(f"cannot write a report to {folder}: {error.strerror}") from error
    _write_csv(folder / "predictions.csv", list(rows[0]), (row.values() for row in rows))
    _write_csv(folder / "per_class.csv", list(figures[0].row()), (figure.row().values() for figure in figures))
    counts = ((name, *row) for name, row in zip(names, confusion.tolist(), strict=True))
    _write_csv(folder / "confusion.csv", ["label", *names], counts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _draw_confusion(folder / "confusion.png", confusion, names)
        _draw_mistakes(
            folder / "mistakes.png",
            [_pixels(source[int(evaluation.indices[place])], preprocessing) for place in worst],
            [rows[place] for place in worst],
        )
    totals = {name: getattr(evaluation, name) for name in ("top1", "top5", "loss", "images", "skipped")}
    report = about | totals
    report["mean_class_accuracy"] = _mean(figure.recall for figure in figures)
    report["mean_f1"] = _mean(figure.f1 for figure in figures)
    report["classes"] = [figure.row() for figure in figures]
    report["confusions"] = _confusions(confusion, names)
    report["mistakes"] = [rows[place] for place in worst]
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean over the classes that have a value; None if there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _confusions(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the most frequent pairs of a true class and a wrong prediction."""
    mistaken = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistaken, axis=None, kind="stable")[:CONFUSIONS]
    pairs = zip(*np.unravel_index(order, mistaken.shape), strict=True)
    return [
        {"label": names[label], "prediction": names[prediction], "images": int(mistaken[label, prediction])}
        for label, prediction in pairs
        if mistaken[label, prediction]
    ]


def _write_csv(path: Place, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _printable(name: str) -> str:
    """Replace the surrogates with which Python represents bytes of file names that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _pixels(example: Example, preprocessing: Preprocessing) -> np.ndarray:
    """Return the part of an image that the net sees, uint8 `[image_size, image_size, C]`."""
    if isinstance(example.image, bytes):
        image = decode_image(example.image, example.name, preprocessing.channels)
    else:
        pixels = example.image[..., 0] if example.image.shape[2:] == (1,) else example.image
        image = to_mode(Image.fromarray(pixels), "L" if preprocessing.channels == 1 else "RGB")
    return eval_transform(image, preprocessing)


def _draw_confusion(path: Place, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Draw the matrix; colours are shares of each true class, and names and counts appear if there are few classes."""
    classes = len(names)
    side = float(np.clip(2.5 + 0.35 * classes, 4, 14))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= 40:
        shortened = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
        axes.set_xticks(range(classes), shortened, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), shortened, parse_math=False)
    if classes <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            if count:
                axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def _draw_mistakes(path: Place, images: Sequence[np.ndarray], rows: Sequence[dict[str, Any]]) -> None:
    columns = min(8, max(1, len(images)))
    lines = max(1, -(-len(images) // columns))
    figure = _figure(1.9 * columns, 2.3 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, row in zip(grid.flat, images, rows, strict=False):
        axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        title = f"{row['prediction_name'][:20]} {100 * row['probability']:.0f} %\nis {row['label_name'][:20]}"
        axes.set_title(title, fontsize=8, parse_math=False)
    if not images:
        figure.suptitle("no wrong prediction")
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    """Return a figure without pyplot, whose backend is the caller's choice."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Place) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
