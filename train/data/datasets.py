"""Data sets: a table with the settings of each, and `open_dataset`, which opens one."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repvgg_jax.digits import MEAN, STD
from repvgg_jax.errors import DataError
from repvgg_jax.extras import install_hint
from repvgg_jax.net.variants import Variant, get_variant
from repvgg_jax.paths import Place, local_path, option_place
from repvgg_jax.preprocess import Preprocessing, in_grey
from repvgg_jax.weights.info import default_preprocessing

from .bucket import on_this_machine
from .folders import open_folder
from .pipeline import BadImages
from .sources import Source, SyntheticSource, UnopenedSource

_SYNTHETIC_IMAGES, _SYNTHETIC_TEST_IMAGES = 1_281_167, 50_000  # as many as ImageNet


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set, opened for training and evaluation.

    Attributes:
      name: the specification it was opened with.
      train, test: the two splits. `train` is empty if the data set was opened for evaluation only.
      preprocessing: preparation of the images in evaluation.
      train_size: height and width of the training crops.
      train_transform: name of the transform that crops or resizes its training images, for `make_transform`.
      notes: messages for the user, such as the number of files that were left out, one line each.
      bad_test_images: record of images of `test` that cannot be read, so that evaluations report each once.
    """

    name: str
    train: Source
    test: Source
    preprocessing: Preprocessing
    train_size: int
    train_transform: str
    notes: tuple[str, ...] = ()
    bad_test_images: BadImages = dataclasses.field(default_factory=BadImages, compare=False)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; a label is an index into them."""
        return self.test.class_names

    @property
    def has_class_names(self) -> bool:
        """Whether the names mean anything, which those of synthetic images and of an unopened data set do not."""
        return self.name != "synthetic" and not isinstance(self.test, UnopenedSource)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.test.class_names)


@dataclasses.dataclass(frozen=True)
class Request:
    """Request to open a data set's splits.

    Attributes:
      spec: specification of the data set.
      data_dir: folder of the TFDS data sets.
      train_split, test_split: splits of a TFDS data set; None takes the usual ones.
      evaluation_only: open no training split.
      preprocessing: preprocessing of evaluation, whose size and channels synthetic images take.
    """

    spec: str
    data_dir: Place
    train_split: str | None
    test_split: str | None
    evaluation_only: bool
    preprocessing: Preprocessing


@dataclasses.dataclass(frozen=True)
class Counts:
    """Number of classes of a data set, and of images in its usual splits, known without opening it."""

    classes: int
    train: int
    test: int


Opened = tuple[Source, Source, tuple[str, ...]]
"""The training split, the evaluation split, and messages for the user about them."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings of a data set. A recipe can override all but `source` and `counts`.

    Attributes:
      source: function that opens its splits.
      mean, std: mean and standard deviation of each colour, for pixel values in 0..1; None for ImageNet's.
      train_size: height and width of the training crops.
      test_size: height and width of the evaluation crops; None takes the variant's published size.
      crop_fraction: share of the resized shorter side that an evaluation crop keeps; None takes the variant's
        published value, adapted to another size by `Preprocessing.at_size`.
      train_transform: a key of `transforms.TRANSFORMS`.
      counts: numbers of classes and images, for uses without the data; None if they are not known.
    """

    source: Callable[[Request], Opened]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_size: int = 224
    test_size: int | None = None
    crop_fraction: float | None = None
    train_transform: str = "random_resized_crop_flip"
    counts: Counts | None = None


def row_of(spec: str) -> Row:
    """Return the row of a data set, or that of photographs if it has none."""
    row = DATA_SETS.get(spec.partition(":")[0], PHOTOGRAPHS)  # NAME:VERSION, where TFDS has versions
    return row if spec in DATA_SETS or row.source is _folder_or_tfds else PHOTOGRAPHS


def open_dataset(
    spec: str,
    *,
    variant: Variant | None = None,
    image_size: int | None = None,
    train_size: int | None = None,
    crop_fraction: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    train_transform: str | None = None,
    channels: int = 3,
    data_dir: str | os.PathLike[str] | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    evaluation_only: bool = False,
    unopened: bool = False,
) -> DataSet:
    """Open a data set; images are read later.

    Args:
      spec: a name in `DATA_SETS`: "digits" (scikit-learn's, written to `data_dir` the first time) or "synthetic"
        (random pixels, for benchmarks); a folder with `train/CLASS/*` and `val/CLASS/*` (or `validation/`, `valid/`,
        `test/`, in this order of preference); or a TFDS name `NAME[/CONFIG][:VERSION]` of a data set prepared under
        `data_dir`. An existing folder wins over a TFDS name.
      variant: the net that will see the data; None for 224 pixels at a crop fraction of 0.875, as for most variants.
      image_size: height and width of the network's input in evaluation.
      train_size: height and width of the training crops; like the next four, None takes the value of the row.
      crop_fraction: share of the resized shorter side that an evaluation crop keeps.
      mean: mean of each colour, for pixel values in 0..1.
      std: standard deviation of each colour, for pixel values in 0..1.
      train_transform: a key of `transforms.TRANSFORMS`.
      channels: 3 for RGB, 1 for grey.
      data_dir: folder of the TFDS data sets; None takes $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      train_split: training split of a TFDS data set, or a slice of one, such as "train[:90%]"; None takes `train`.
      test_split: evaluation split, such as "train[90%:]"; None takes `validation`, or else `test`.
      evaluation_only: open no training split.
      unopened: do not open the data if the row has counts of its classes and images; the splits cannot be read then,
        and numbers stand for the class names. A folder is always opened.

    Raises:
      DataError: the data set is missing or wrong; one line says what, where, and what to do.
      ConfigError: `spec` or `data_dir` is a URL that is not supported.
      ValueError: `image_size`, `channels`, `crop_fraction`, `mean` or `std` is out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    row = row_of(spec)
    if channels == 1:
        row = dataclasses.replace(row, mean=row.mean and in_grey(row.mean), std=row.std and in_grey(row.std))
    columns = dict(train_size=train_size, test_size=image_size, crop_fraction=crop_fraction, mean=mean, std=std)
    row = dataclasses.replace(row, **_without_none(columns | {"train_transform": train_transform}))
    preprocessing = default_preprocessing(variant or get_variant("RepVGG-A0"), channels)
    if row.test_size is not None:
        preprocessing = preprocessing.at_size(row.test_size)
    chosen = {"crop_fraction": row.crop_fraction, "mean": row.mean, "std": row.std}
    preprocessing = dataclasses.replace(preprocessing, **_without_none(chosen))
    folder = option_place(
        "--data-dir", os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    )
    source = _unopened if unopened and not _is_folder(spec, row) else row.source
    train, test, notes = source(Request(spec, folder, train_split, test_split, evaluation_only, preprocessing))
    return DataSet(
        name=spec,
        train=train,
        test=test,
        preprocessing=preprocessing,
        train_size=row.train_size,
        train_transform=row.train_transform,
        notes=notes,
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _is_folder(spec: str, row: Row) -> bool:
    """Return whether a specification means a local folder, even one that does not exist; it wins over a TFDS name."""
    return row.source is _folder_or_tfds and (local_path("the data set", spec).exists() or _names_a_path(spec))


def _names_a_path(spec: str) -> bool:
    return spec.startswith((".", "~", os.sep))


def _unopened(request: Request) -> Opened:
    """Return both splits without their data, from the row's counts or by opening the data set.

    Raises:
      DataError: the row has no counts, and the data set cannot be opened.
    """
    row = row_of(request.spec)
    if row.counts is not None:
        names = [f"class {label}" for label in range(row.counts.classes)]
        return UnopenedSource(row.counts.train, names), UnopenedSource(row.counts.test, names), ()
    try:
        return row.source(request)
    except DataError as error:
        counted = ", ".join(name for name, row in DATA_SETS.items() if row.counts is not None)
        raise DataError(
            f"the number of classes in {request.spec} is unknown, and it cannot be opened here; give --data a folder "
            f"with train/CLASS/IMAGE and val/CLASS/IMAGE, or one of {counted}"
        ) from error


def _folder_or_tfds(request: Request) -> Opened:
    spec = request.spec
    folder = local_path("the data set", spec)
    if folder.is_dir():
        _refuse_splits(request)
        return open_folder(folder, request.evaluation_only)
    if folder.exists() or _names_a_path(spec):
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{spec} {problem}; give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    try:
        from . import tfds_source
    except ImportError as error:
        raise _missing_extra(spec, error) from error
    return _tfds_splits(tfds_source.find_dataset(spec, on_this_machine(request.data_dir, spec)), request)


def _digits(request: Request) -> Opened:
    try:
        from . import digits_builder
    except ImportError as error:
        raise _missing_extra(request.spec, error) from error
    return _tfds_splits(
        digits_builder.prepare(on_this_machine(request.data_dir, digits_builder.NAME, or_empty=True)), request
    )


def _synthetic(request: Request) -> Opened:
    _refuse_splits(request)
    size, channels = request.preprocessing.image_size, request.preprocessing.channels
    train = SyntheticSource(_SYNTHETIC_IMAGES, size, channels, seed=0)
    return train, SyntheticSource(_SYNTHETIC_TEST_IMAGES, size, channels, seed=1), ()


def _refuse_splits(request: Request) -> None:
    for option, split in (("--train-split", request.train_split), ("--test-split", request.test_split)):
        if split is not None:
            raise DataError(f"{option} {split} is for TFDS data sets; {request.spec} has folders or images of its own")


def _tfds_splits(directory: Path, request: Request) -> Opened:
    from .tfds_source import TEST_SPLITS, TRAIN_SPLITS, TfdsSource, find_split, shared_images

    test_split = request.test_split or find_split(directory, TEST_SPLITS)
    test = TfdsSource(directory, test_split)
    if request.evaluation_only:
        return UnopenedSource(0, test.class_names), test, ()
    train_split = request.train_split or find_split(directory, TRAIN_SPLITS)
    train = TfdsSource(directory, train_split)
    shared = shared_images(directory, train_split, test_split)
    note = f"{shared} of {len(test)} evaluation images ({test_split}) are also training images ({train_split})"
    return train, test, (note,) if shared else ()


def _missing_extra(spec: str, error: ImportError) -> DataError:
    return DataError(f"the data set {spec!r} needs {error.name}: {install_hint('train')}")


PHOTOGRAPHS = Row(_folder_or_tfds)
"""Folders, and TFDS data sets without a row, which are treated like ImageNet."""

DATA_SETS: dict[str, Row] = {
    "digits": Row(
        _digits,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        train_size=32,
        test_size=32,
        crop_fraction=1.0,
        train_transform="random_affine",
        counts=Counts(classes=10, train=1437, test=360),
    ),
    "synthetic": Row(
        _synthetic,
        crop_fraction=1.0,
        train_transform="as_is",
        counts=Counts(classes=1000, train=_SYNTHETIC_IMAGES, test=_SYNTHETIC_TEST_IMAGES),
    ),
    "imagenet2012": Row(_folder_or_tfds, counts=Counts(classes=1000, train=1_281_167, test=50_000)),
    "cifar10": Row(
        _folder_or_tfds,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train_size=32,
        test_size=32,
        crop_fraction=1.0,
        train_transform="pad_and_crop_flip",
        counts=Counts(classes=10, train=50_000, test=10_000),
    ),
}
