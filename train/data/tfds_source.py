"""Data sets prepared by TensorFlow Datasets, read with random access and without TensorFlow.

TFDS's data source reads ArrayRecord files, and an offset index (`tfrecord.py`) reads TFRecord files. In both cases,
TFDS's features parse the records, and images stay encoded until a worker decodes them.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.read_only_builder import builder_from_files
from tensorflow_datasets.core.registered import DatasetNotFoundError

from repvgg_jax.errors import DataError

from .sources import Example, sample_of
from .tfrecord import Shard, TFRecordFiles

TRAIN_SPLITS = ("train",)
TEST_SPLITS = ("validation", "test")
# Names of the features that name an image, in TFDS's classification data sets.
_NAME_FEATURES = ("file_name", "image/filename", "filename", "id")


class TfdsSource:
    """One split of a prepared TFDS image classification data set; thread-safe and picklable.

    Args:
      directory: folder of the prepared data set, `DATA_DIR/NAME[/CONFIG]/VERSION`.
      split: name of a split, or a slice of one (`train[:10%]`).

    Raises:
      DataError: the data set or split does not exist, is empty, or does not consist of labelled uint8 images.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        builder = _open_builder(directory)
        self._name = f"{builder.info.full_name}/{split}"
        self._keys, self._features = _features(builder.info)
        self.class_names = list(self._features[self._keys[1]].names)
        self._records = _records(builder, split)
        if not len(self._records):
            raise DataError(f"{self._name} holds no images")
        self._check_labels()

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, (self._directory, self._split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Example:
        example = self._read(index)
        if not 0 <= example.label < len(self.class_names):
            position, classes = f"{self._name}[{index}]", len(self.class_names)
            raise DataError(f"{position}: label {example.label} is not one of the {classes} classes")
        return example

    def _check_labels(self) -> None:
        """Refuse a split with hidden labels (-1), which many test splits have."""
        labels = []
        for index in sample_of(self):
            try:
                labels.append(self._read(index).label)
            except DataError:  # damaged: reported when its image is read
                continue
        if labels and max(labels) < 0:
            raise DataError(f"{self._name} has no labels; choose another split (--train-split, --test-split)")

    def _read(self, index: int) -> Example:
        """Return an example whose label may be hidden or out of range."""
        position, (image_key, label_key, name_key) = f"{self._name}[{index}]", self._keys
        try:
            record = self._records[index]
        except RuntimeError as error:  # raised by array_record for a damaged file
            raise DataError(f"{position}: damaged record ({_line(error)})") from error
        encoded = {image_key: tfds.decode.SkipDecoding()}
        try:
            fields = self._features.deserialize_example_np(record, decoders=encoded)
        # A damaged record fails in protobuf (DecodeError) or later, anywhere in TFDS's parser.
        except Exception as error:
            raise DataError(f"{position}: damaged record ({type(error).__name__})") from error
        name = fields[name_key].decode(errors="replace") if name_key else ""
        return Example(fields[image_key], int(fields[label_key]), f"{position} {name}" if name else position)


def find_dataset(name: str, data_dir: Path) -> Path:
    """Return the folder of the prepared TFDS data set `NAME[/CONFIG][:VERSION]` under `data_dir`.

    Raises:
      DataError: the data set is not prepared there (the message says how to prepare it), or does not exist (the message
        suggests similar names).
    """
    try:
        # From the files, because the registered code would insist on its own newest version.
        return Path(builder_from_files(name, data_dir=data_dir).data_dir)
    except DatasetNotFoundError as error:
        raise _not_found(name, data_dir) from error
    except (ValueError, OSError, ParseError) as error:
        raise DataError(f"cannot open the TFDS data set {name!r} under {data_dir} ({_line(error)})") from error


def find_split(directory: Path, candidates: Sequence[str]) -> str:
    """Return the first of `candidates` that the data set in `directory` has.

    Raises:
      DataError: the data set has none of them.
    """
    info = _open_builder(directory).info
    for split in candidates:
        if split in info.splits:
            return split
    if not info.splits:
        raise DataError(f"{directory} holds no splits: its build is unfinished; prepare the data set again")
    message = f"{info.full_name} has no {' or '.join(candidates)} split, only {', '.join(info.splits)}"
    if set(info.splits) == {"train"}:
        message += "; divide it, such as with --train-split 'train[:90%]' --test-split 'train[90%:]'"
    else:
        message += "; choose with --train-split and --test-split"
    raise DataError(message)


def shared_images(directory: Path, one: str, other: str) -> int:
    """Return the number of images that two splits, or slices of splits, of a data set have in common."""
    builder = _open_builder(directory)
    spans = [[(s.path, s.skip, s.skip + s.take) for s in _shards(builder, split)] for split in (one, other)]
    return sum(
        max(0, min(end, other_end) - max(start, other_start))
        for path, start, end in spans[0]
        for other_path, other_start, other_end in spans[1]
        if path == other_path
    )


def _not_found(name: str, data_dir: Path) -> DataError:
    base = name.split(":")[0].split("/")[0]
    folder = data_dir / base
    if folder.is_dir():
        return _not_finished(name, base, folder)
    of_tfds = set(tfds.list_builders(with_community_datasets=False))
    if base in of_tfds:
        # Preparation is left to TFDS, as nearly all of its builders need TensorFlow, and some a manual download.
        return DataError(
            f"TFDS data set {name!r} is not prepared under {data_dir}; prepare it where tensorflow is installed "
            f"with `tfds build {name} --file_format=array_record --data_dir={data_dir}`, or say "
            "where it is with --data-dir or TFDS_DATA_DIR"
        )
    prepared = {p.name for p in data_dir.iterdir() if p.is_dir()} if data_dir.is_dir() else set()
    names = sorted((of_tfds | prepared | {"digits", "synthetic"}) - {name, base})
    near = difflib.get_close_matches(base, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "give a folder, a TFDS name, digits or synthetic"
    return DataError(f"no folder and no TFDS data set is called {name!r}; {hint}")


def _not_finished(name: str, base: str, folder: Path) -> DataError:
    """Return the error for a `folder` that has the data set's name, but not this configuration or version."""
    unfinished = sorted(path for path in folder.rglob("*.incomplete*") if path.is_dir())
    if unfinished:
        return DataError(
            f"the build of the TFDS data set {name!r} is unfinished ({unfinished[0]}); wait for it, or remove that "
            "folder and build it again"
        )
    built = sorted(path.parent.relative_to(folder) for path in folder.rglob("dataset_info.json"))
    if not built:
        return DataError(f"{folder} holds no finished build of the TFDS data set {name!r}; build it again")
    names = ["/".join((base, *path.parts[:-1])) + f":{path.name}" for path in built[:3]]
    return DataError(f"{folder} does not hold the TFDS data set {name!r}; did you mean {' or '.join(names)}?")


def _open_builder(directory: Path) -> Any:
    try:
        return tfds.builder_from_directory(directory)
    except (ValueError, OSError, ParseError) as error:
        raise DataError(f"{directory} holds no readable TFDS data set ({_line(error)})") from error


def _features(info: Any) -> tuple[tuple[str, str, str | None], Any]:
    """Return the keys of the image, label and name features, and a parser of only these.

    Other features, such as a segmentation mask, would only cost time.
    """
    keys = info.supervised_keys
    image, label = keys if keys and len(keys) == 2 else ("image", "label")
    available = dict(info.features.items())
    if not isinstance(available.get(label), tfds.features.ClassLabel) or not available[label].names:
        raise DataError(f"{info.full_name} has no class labels: not an image classification data set")
    feature = available.get(image)
    if not isinstance(feature, tfds.features.Image) or feature.np_dtype != np.uint8:
        raise DataError(f"{info.full_name} has no 8-bit images: not an image classification data set")
    name = next((key for key in _NAME_FEATURES if isinstance(available.get(key), tfds.features.Text)), None)
    chosen = {key: available[key] for key in (image, label, name) if key}
    return (image, label, name), tfds.features.FeaturesDict(chosen)


def _records(builder: Any, split: str) -> Any:
    """Return the encoded records of a split, as a sequence of bytes."""
    formats = builder.info.available_file_formats()
    try:
        if FileFormat.ARRAY_RECORD in formats:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            source = builder.as_data_source(split, deserialize_method=raw, file_format=FileFormat.ARRAY_RECORD)
            _shards(builder, split)
            return source
        if FileFormat.TFRECORD in formats:
            return TFRecordFiles(_shards(builder, split))
    except (KeyError, ValueError) as error:
        if split.partition("[")[0] in builder.info.splits:
            raise DataError(f"cannot take the split {split!r} of {builder.info.full_name} ({_line(error)})") from error
        splits = ", ".join(builder.info.splits)
        raise DataError(f"{builder.info.full_name} has no split {split!r}, only {splits}") from error
    names = ", ".join(sorted(fmt.value for fmt in formats)) or "no known record files"
    raise DataError(f"{builder.data_dir} holds {names}; prepare it again with --file_format=array_record")


def _shards(builder: Any, split: str) -> list[Shard]:
    files = builder.info.splits[split].file_instructions
    shards = [Shard(Path(file.filename), file.skip, file.take) for file in files]
    for shard in shards:
        if not shard.path.is_file():
            raise DataError(f"record file {shard.path} is missing; prepare the data set again")
    return shards


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
