"""Claim: data sets open from wherever they are, are real and complete, and their errors say what to do."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tensorboardX.record_writer import RecordWriter

from repvgg_jax.errors import DataError
from repvgg_jax.preprocess import Preprocessing, decode_image, normalize
from tests.helpers.batches import evaluation, flat, training
from tests.helpers.photos import PHOTO, encode, write_photos
from tests.helpers.repository import ROOT
from train.data import DataSet, eval_batches, get_transform, open_dataset
from train.data.sources import FolderSource, SyntheticSource
from train.data.tfds_source import TEST_SPLITS, TfdsSource, find_dataset, find_split
from train.data.tfrecord import Shard, TFRecordFiles, record_spans


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 22 training and 13 evaluation photographs of two classes."""
    write_photos(tmp_path / "photos" / "train", 22)
    write_photos(tmp_path / "photos" / "val", 13, offset=5)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits data set is written, once."""
    folder = tmp_path_factory.mktemp("tfds")
    open_dataset("digits", image_size=32, data_dir=folder)
    return folder


@pytest.fixture
def digits(data_dir: Path) -> DataSet:
    return open_dataset("digits", image_size=32, data_dir=data_dir)


# Digits: real, written once, split proportionally


def test_digits_are_scikit_learns_scans(digits: DataSet) -> None:
    images, labels = load_digits(return_X_y=True)
    seen = []
    for source in (digits.train, digits.test):
        for index in range(len(source)):
            example = source[index]
            assert isinstance(example.image, bytes)
            scan = int(example.name.rsplit(" ", 1)[1])
            pixels = np.asarray(decode_image(example.image, example.name, channels=1))
            assert np.array_equal(np.rint(pixels * (16 / 255)), images[scan].reshape(8, 8))
            assert example.label == labels[scan]
            seen.append(scan)
    assert sorted(seen) == list(range(1797)), "every scan is in exactly one split"


def test_digits_are_split_1437_to_360_with_every_class_in_proportion(digits: DataSet) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    counts = [np.bincount([s[i].label for i in range(len(s))]) for s in (digits.train, digits.test)]
    assert np.abs(counts[1] / 360 - (counts[0] + counts[1]) / 1797).max() < 1 / 360


def test_digits_have_the_stated_mean_and_deviation(digits: DataSet) -> None:
    images = [digits.train[i].image for i in range(len(digits.train))]
    pixels = np.stack([np.asarray(decode_image(i, "", 1)) for i in images if isinstance(i, bytes)]) / 255
    assert (round(pixels.mean(), 3), round(pixels.std(), 3)) == (
        digits.preprocessing.mean[0],
        digits.preprocessing.std[0],
    )


def test_digits_are_written_once(data_dir: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}

    before = stamps()
    open_dataset("digits", image_size=32, data_dir=data_dir)
    assert stamps() == before
    assert not list(data_dir.glob(".*")), "nothing half-written remains"


def test_two_processes_may_write_the_digits_at_once(tmp_path: Path) -> None:
    opened = f"open_dataset('digits', image_size=8, data_dir={str(tmp_path)!r})"
    code = f"from train.data import open_dataset; print(len({opened}.test))"
    options: dict[str, Any] = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in outputs] == ["360\n", "360\n"], outputs
    assert [path.name for path in tmp_path.iterdir()] == ["sklearn_digits"]


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot write the digits data set under .*--data-dir"):
        open_dataset("digits", image_size=32, data_dir=tmp_path / "file")


def test_digits_use_the_same_training_pipeline(digits: DataSet) -> None:
    options = dict(transform=get_transform(digits.train_transform), preprocessing=digits.preprocessing)
    batch = training(digits.train, 1, batch_size=128, local_device_count=4, **options)[0]
    assert batch["image"].shape == (4, 32, 32, 32, 3)
    assert 0.2 < batch["image"].mean() / 255 < 0.4


# Sources


def test_classes_and_files_are_in_sorted_order(photos: Path) -> None:
    (photos / "val" / "garden" / "notes.txt").write_text("no image", encoding="utf-8")
    (photos / "val" / ".cache").mkdir()
    dataset = open_dataset(str(photos), image_size=16)
    assert dataset.class_names == ["garden", "pagoda"]
    assert (dataset.num_classes, len(dataset.train), len(dataset.test)) == (2, 22, 13)
    names = [dataset.test[index].name for index in range(13)]
    assert names == sorted(names)
    assert [dataset.test[index].label for index in (0, 6, 7, 12)] == [0, 0, 1, 1]


def test_evaluation_alone_needs_no_training_folder(photos: Path) -> None:
    shutil.rmtree(photos / "train")
    dataset = open_dataset(str(photos), image_size=16, evaluation_only=True)
    assert (len(dataset.train), len(dataset.test)) == (0, 13)


def test_synthetic_images_are_random_and_repeatable() -> None:
    dataset = open_dataset("synthetic", image_size=24)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (1_281_167, 50_000, 1000)
    batch = training(dataset.train, 1, transform=get_transform("as_is"), preprocessing=dataset.preprocessing)[0]
    assert batch["image"].shape == (1, 8, 24, 24, 3)
    first, again = SyntheticSource(100, 24)[5], SyntheticSource(100, 24)[5]
    assert np.array_equal(first.image, again.image)
    assert np.asarray(first.image).std() > 70
    assert len({SyntheticSource(100, 24)[i].label for i in range(50)}) > 40


@pytest.mark.parametrize("spec", ["digits", "photos", "synthetic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_images_are_both_available(photos: Path, data_dir: Path, spec: str, channels: int) -> None:
    dataset = open_dataset(
        str(photos) if spec == "photos" else spec, image_size=16, data_dir=data_dir, channels=channels
    )
    assert dataset.preprocessing.channels == channels
    options: dict[str, Any] = dict(transform=get_transform(dataset.train_transform))
    batch = training(dataset.train, 1, preprocessing=dataset.preprocessing, **options)[0]
    assert batch["image"].shape == (1, 8, 16, 16, channels)
    assert normalize(batch["image"], dataset.preprocessing).dtype == np.float32


def test_sources_survive_pickling(photos: Path, digits: DataSet) -> None:
    for source in (FolderSource(photos / "train"), digits.test):
        copy = pickle.loads(pickle.dumps(source))
        assert (len(copy), copy.class_names, copy[3]) == (len(source), source.class_names, source[3])


# TFDS data sets, with and without TFRecord


@pytest.fixture
def tfrecords(data_dir: Path, tmp_path: Path) -> Path:
    """The digits data set as TFDS stores it by default: TFRecord files, here the test split in two shards."""
    folder = tmp_path / "digits_tfrecord" / "1.0.0"
    shutil.copytree(find_dataset("sklearn_digits", data_dir), folder)
    source = TfdsSource(folder, "test")
    records = [source._records[index] for index in range(360)]
    for path in folder.glob("*.array_record-*"):
        path.unlink()
    for number, part in enumerate([records[:200], records[200:]]):
        writer = RecordWriter(str(folder / f"digits_tfrecord-test.tfrecord-0000{number}-of-00002"))
        for record in part:
            writer.write(record)
        writer.close()
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    splits = [info["splits"][1] | {"shardLengths": ["200", "160"]}]
    info |= {"name": "digits_tfrecord", "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def test_tfrecord_files_are_read_in_any_order_without_tensorflow(tfrecords: Path, digits: DataSet) -> None:
    source = TfdsSource(tfrecords, "test")
    assert len(source) == 360
    for index in (0, 359, 199, 200, 7):
        ours, reference = source[index], digits.test[index]
        assert (ours.image, ours.label) == (reference.image, reference.label)
    assert pickle.loads(pickle.dumps(source))[250].image == source[250].image
    assert "tensorflow" not in sys.modules


def test_a_tfds_name_loads_the_version_on_disk(tfrecords: Path) -> None:
    for name in ("digits_tfrecord", "digits_tfrecord:1.0.0"):
        dataset = open_dataset(name, image_size=16, data_dir=tfrecords.parents[1], evaluation_only=True)
        assert (len(dataset.test), dataset.num_classes) == (360, 10)


def test_data_dir_comes_from_the_environment(tfrecords: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfrecords.parents[1]))
    assert len(open_dataset("digits_tfrecord", image_size=16, evaluation_only=True).test) == 360


def test_record_offsets_match_the_writers(tmp_path: Path) -> None:
    records = [b"", b"one", bytes(5000), b"last"]
    path = tmp_path / "x.tfrecord"
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    data = path.read_bytes()
    assert [data[start : start + length] for start, length in record_spans(path)] == records
    part = TFRecordFiles([Shard(path, 1, 2), Shard(path, 0, 1)])
    assert [part[index] for index in range(len(part))] == [b"one", bytes(5000), b""]


def test_complete_records_of_a_truncated_file_are_read(tfrecords: Path) -> None:
    path = tfrecords / "digits_tfrecord-test.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-5])
    source = TfdsSource(tfrecords, "test")
    assert source[358].label in range(10)
    with pytest.raises(DataError, match="00001-of-00002: cut short, 159 records of 160; prepare it again"):
        source[359]
    batches = evaluation(source, batch_size=120, preprocessing=Preprocessing(8, 1.0))
    assert flat(batches, "mask").sum() == 359


def test_damaged_records_are_unreadable_images(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sklearn_digits" / "1.0.0"
    shutil.copytree(find_dataset("sklearn_digits", data_dir), folder)
    (path,) = folder.glob("*-test.array_record-*")
    data = bytearray(path.read_bytes())
    data[30_000:50_000] = bytes(20_000)
    path.write_bytes(data)
    with eval_batches(
        TfdsSource(folder, "test"), batch_size=120, local_device_count=1, preprocessing=Preprocessing(8, 1.0)
    ) as batches:
        counted = sum(batch["mask"].sum() for batch in batches)
    assert 0 < batches.skipped < 360
    assert counted == 360 - batches.skipped


def test_evaluation_uses_validation_or_else_test(data_dir: Path) -> None:
    directory = find_dataset("sklearn_digits", data_dir)
    assert TEST_SPLITS == ("validation", "test")
    assert find_split(directory, TEST_SPLITS) == "test"
    with pytest.raises(DataError, match=r"sklearn_digits/1\.0\.0 has no validation split, only train, test"):
        find_split(directory, ["validation"])


# Errors of `load`: one line that says what, where and what to do


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def broken_folders(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (spec, pattern of the message), each after another change to the folder."""
    yield str(root / "absent"), "absent does not exist; give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE"
    yield str(root / "val" / "garden" / "000.jpg"), r"000\.jpg is a file, not a folder"
    yield str(root / "train"), r"train holds no train/ and no val/; expected .*train.CLASS.IMAGE and "
    (root / "val" / "temple").mkdir()
    yield str(root), r"class folder .*val.temple holds no images; add some \(\.jpg, .*\) or remove it"
    (root / "val" / "temple" / "1.jpg").write_bytes(encode(PHOTO, "JPEG"))
    yield str(root), r"hold different classes \(only in val/: temple\)"
    remove(root / "val" / "pagoda")
    yield str(root), r"hold different classes \(only in train/: pagoda; only in val/: temple\)"
    remove(root / "val" / "garden")
    remove(root / "val" / "temple")
    yield str(root), r"val holds no class folders; expected .*val.CLASS.IMAGE\.jpg"
    remove(root / "val")
    yield str(root), r"photos holds no val/; expected .*; to split train/ into both: .*split \S+photos.train OUT$"


def test_every_flaw_of_a_folder_is_reported(photos: Path) -> None:
    for spec, message in broken_folders(photos):
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(spec, image_size=16)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet201", "called 'imagenet201'; did you mean imagenet2012 or"),
        ("digit", "did you mean digits"),
        ("data/photos", "no folder and no TFDS data set is called 'data/photos'"),
        ("imagenet2012", "not prepared under .*tfds build imagenet2012 --file_format=array_record --data_dir="),
        ("sklearn_digits:7.0.0", "did you mean sklearn_digits"),
        ("a b/c:d", "cannot open the TFDS data set 'a b/c:d'"),
    ],
)
def test_a_missing_tfds_data_set_is_reported_with_advice(spec: str, message: str, data_dir: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(spec, image_size=16, data_dir=data_dir)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_unsuitable_tfds_data_set_is_reported(tfrecords: Path) -> None:
    def attempt(message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset("digits_tfrecord", image_size=16, data_dir=tfrecords.parents[1])

    attempt("digits_tfrecord/1.0.0 has no train split, only test")
    features, text = tfrecords / "features.json", (tfrecords / "features.json").read_text(encoding="utf-8")
    for name, message in (("label", "no class labels"), ("image", "no 8-bit images")):
        content = json.loads(text)
        fields = content["featuresDict"]["features"]
        fields[name] = fields["id"]
        features.write_text(json.dumps(content), encoding="utf-8")
        attempt(message)
    features.write_text(text, encoding="utf-8")
    next(tfrecords.glob("*00001-of-00002")).unlink()
    attempt("record file .*00001-of-00002 is missing; prepare the data set again")
    (tfrecords / "dataset_info.json").write_text("{", encoding="utf-8")
    attempt("cannot open the TFDS data set 'digits_tfrecord'")


def test_a_file_that_vanishes_is_an_unreadable_image(photos: Path) -> None:
    source = FolderSource(photos / "train")
    (photos / "train" / "garden" / "000.jpg").unlink()
    with pytest.raises(DataError, match=r"000\.jpg: cannot be read \(No such file or directory\)"):
        source[0]


@pytest.mark.parametrize("options", [{"image_size": 0}, {"channels": 2}, {"crop_fraction": 1.5}])
def test_out_of_range_numbers_are_value_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image_size|channels|crop_fraction"):
        open_dataset("synthetic", **(dict[str, Any](image_size=16) | options))
