"""Data: sources of labelled images, and batches of them shaped for the devices.

`load` opens a data set, `make_transform` describes its augmentation, `train_batches` and `eval_batches` read its
splits, `Prefetch` takes batches to the devices.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from repvgg_jax.digits import MEAN, STD
from repvgg_jax.errors import DataError
from repvgg_jax.extras import install_hint
from repvgg_jax.image_files import describe_left_out
from repvgg_jax.net.variants import Variant
from repvgg_jax.paths import local_path
from repvgg_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

from .augmentation import Augmentation, make_transform
from .batches import BadImages, Batches
from .folders import open_folder
from .pipeline import eval_batches, steps_per_epoch, train_batches
from .prefetch import Prefetch
from .sources import EmptySource, Example, Source, SyntheticSource
from .transforms import TRANSFORMS, Transform, get_transform

__all__ = [
    "TRANSFORMS",
    "Augmentation",
    "BadImages",
    "Batches",
    "DataSet",
    "Example",
    "Prefetch",
    "Source",
    "Transform",
    "describe_left_out",
    "eval_batches",
    "get_transform",
    "load",
    "make_transform",
    "steps_per_epoch",
    "train_batches",
]

# timm's numbers for grey input: the means over the colours.
_GREY_MEAN, _GREY_STD = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
_SYNTHETIC_IMAGES, _SYNTHETIC_TEST_IMAGES = 1_281_167, 50_000  # as many as ImageNet


@dataclass(frozen=True)
class DataSet:
    """A data set as training and evaluation need it.

    Attributes:
      name: the specification it was loaded by.
      train, test: the two splits. `train` is empty if only evaluation was asked for.
      preprocessing: how its images become network input.
      train_transform: name of the transform (crop, or none) that suits it; `make_transform` builds on it.
      notes: what a user should know of it, such as files that were left out, a line each.
      bad_test_images: where evaluations record images of `test` that they cannot read, to name each once.
    """

    name: str
    train: Source
    test: Source
    preprocessing: Preprocessing
    train_transform: str
    notes: tuple[str, ...] = ()
    bad_test_images: BadImages = field(default_factory=BadImages, compare=False)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; a label is an index into them."""
        return self.test.class_names

    @property
    def has_class_names(self) -> bool:
        """Whether the names mean anything: those of synthetic images do not."""
        return self.name != "synthetic"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.test.class_names)


def load(
    spec: str,
    *,
    image_size: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    channels: int = 3,
    crop_fraction: float | None = None,
    variant: Variant | None = None,
    evaluation_only: bool = False,
    train_split: str | None = None,
    test_split: str | None = None,
) -> DataSet:
    """Open a data set; images are read later.

    Args:
      spec: "digits" (scikit-learn's, written to `data_dir` the first time), "synthetic" (random pixels, for
        benchmarks), a folder with `train/CLASS/*` and `val/CLASS/*` (or `validation/`, `valid/`, `test/`, in this
        order of preference), or a TFDS name `NAME[/CONFIG][:VERSION]` of a data set prepared under `data_dir`. An
        existing folder wins over a TFDS name.
      image_size: height and width of the network's input in evaluation; None takes the variant's published one.
      data_dir: where TFDS data sets are; None takes $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      channels: 3 for RGB, 1 for grey.
      crop_fraction: of the evaluation transform; None crops photographs as the variant's published evaluation does
        (at another size, as `Preprocessing.at_size` has it), and the others not at all.
      variant: the net that will see the data; None for 224 pixels at a crop fraction of 0.875, as most have it.
      evaluation_only: do without a training split.
      train_split, test_split: of a TFDS data set, also slices of splits, such as "train[:90%]" and "train[90%:]"; None
        takes `train`, and `validation` or else `test`.

    Returns:
      The data set.

    Raises:
      DataError: one line that says what is missing or wrong, where, and what to do.
      ConfigError: a URL.
      ValueError: `image_size`, `channels` or `crop_fraction` is out of range.
    """
    preprocessing = _published(variant, channels)
    if image_size is not None:
        preprocessing = preprocessing.at_size(image_size)
    if crop_fraction is None and spec in ("digits", "synthetic"):
        crop_fraction = 1.0
    if crop_fraction is not None:
        preprocessing = dataclasses.replace(preprocessing, crop_fraction=crop_fraction)
    splits = (train_split, test_split)
    if spec == "digits":
        return _digits(_data_dir(data_dir), preprocessing, splits)
    if spec == "synthetic":
        _refuse_splits(spec, splits)
        return _synthetic(preprocessing)
    folder = local_path("the data set", spec)
    if folder.is_dir():
        _refuse_splits(spec, splits)
        return _folder(folder, preprocessing, evaluation_only)
    if folder.exists() or spec.startswith((".", "~", os.sep)):
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{spec} {problem}; give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    return _tfds(spec, _data_dir(data_dir), preprocessing, evaluation_only, splits)


def _published(variant: Variant | None, channels: int) -> Preprocessing:
    """The variant's evaluation as published, or most variants'."""
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (_GREY_MEAN, _GREY_STD)
    if variant is None:
        return Preprocessing(mean=mean, std=std)
    return Preprocessing(variant.image_size, variant.crop_fraction, mean, std)


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    return local_path("--data-dir", os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def _folder(root: Path, preprocessing: Preprocessing, evaluation_only: bool) -> DataSet:
    train, test, notes = open_folder(root, evaluation_only)
    return DataSet(str(root), train, test, preprocessing, "random_resized_crop_flip", notes)


_Splits = tuple[str | None, str | None]  # for training and for evaluation, where they were asked for


def _refuse_splits(spec: str, splits: _Splits) -> None:
    for option, split in zip(("--train-split", "--test-split"), splits, strict=True):
        if split is not None:
            raise DataError(f"{option} {split} is for TFDS data sets; {spec} has folders or images of its own")


def _tfds(name: str, data_dir: Path, preprocessing: Preprocessing, evaluation_only: bool, splits: _Splits) -> DataSet:
    try:
        from . import tfds_source
    except ImportError as error:
        raise _missing_extra(name, error) from error
    directory = tfds_source.find_dataset(name, data_dir)
    train, test, notes = _tfds_sources(directory, splits, evaluation_only)
    return DataSet(name, train, test, preprocessing, "random_resized_crop_flip", notes)


def _tfds_sources(
    directory: Path, splits: _Splits, evaluation_only: bool = False
) -> tuple[Source, Source, tuple[str, ...]]:
    """Training split, evaluation split, and what a user should know of the two."""
    from . import tfds_source

    train_split, test_split = splits
    if test_split is None:
        test_split = tfds_source.find_split(directory, tfds_source.TEST_SPLITS)
    test = tfds_source.TfdsSource(directory, test_split)
    if evaluation_only:
        return EmptySource(test.class_names), test, ()
    if train_split is None:
        train_split = tfds_source.find_split(directory, tfds_source.TRAIN_SPLITS)
    train = tfds_source.TfdsSource(directory, train_split)
    shared = tfds_source.shared_images(directory, train_split, test_split)
    note = f"{shared} of {len(test)} evaluation images ({test_split}) are training images too ({train_split})"
    return train, test, (note,) if shared else ()


def _digits(data_dir: Path, preprocessing: Preprocessing, splits: _Splits) -> DataSet:
    try:
        from . import digits
    except ImportError as error:
        raise _missing_extra("digits", error) from error
    directory = digits.prepare(data_dir)
    train, test, notes = _tfds_sources(directory, splits)
    mean, std = (MEAN,) * preprocessing.channels, (STD,) * preprocessing.channels
    preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
    return DataSet("digits", train, test, preprocessing, "random_affine", notes)


def _synthetic(preprocessing: Preprocessing) -> DataSet:
    size, channels = preprocessing.image_size, preprocessing.channels
    train = SyntheticSource(_SYNTHETIC_IMAGES, size, channels, seed=0)
    test = SyntheticSource(_SYNTHETIC_TEST_IMAGES, size, channels, seed=1)
    return DataSet("synthetic", train, test, preprocessing, "as_is")


def _missing_extra(spec: str, error: ImportError) -> DataError:
    return DataError(f"the data set {spec!r} needs {error.name}: {install_hint('train')}")
