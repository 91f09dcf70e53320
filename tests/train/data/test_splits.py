"""Claim: any split of a TFDS data set, or slice of one, can be used; an unusable one is refused at the start."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.errors import DataError
from repvgg_jax.net.variants import Variant
from tests.helpers.architecture import write_variant
from tests.helpers.commands import command
from tests.helpers.random_weights import random_variables
from train.data import open_dataset

SMALL = Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=16)
CLASSES = ("cat", "dog", "fox", "owl")


class Animals(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Twenty labelled images to train on, and splits as the test sets them."""

    VERSION = tfds.core.Version("1.2.0")
    name = "animals"
    code_path = None
    splits: dict[str, list[int]]

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(labels) for name, labels in self.splits.items()}

    def _generate_examples(self, labels: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, label in enumerate(labels):
            file = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 10 * index, np.uint8)).save(file, "PNG")
            yield index, {"image": file.getvalue(), "label": label}


def build(data_dir: Path, **splits: list[int]) -> Path:
    """Build the data set `animals` under `data_dir`; return its folder."""
    builder = Animals(data_dir=data_dir, file_format="array_record")
    builder.splits = splits
    builder.download_and_prepare()
    return Path(builder.data_dir)


LABELS = [index % 4 for index in range(20)]


@pytest.fixture(scope="module")
def only_train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    build(folder, train=LABELS)
    return folder


def shades(source: Any) -> list[int]:
    """Return which images a source holds: image i has the grey value 10 i."""
    return [np.asarray(Image.open(io.BytesIO(source[i].image)))[0, 0, 0] // 10 for i in range(len(source))]


def test_a_data_set_with_only_a_train_split_says_how_to_divide_it(only_train: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset("animals", data_dir=only_train)
    assert str(caught.value) == (
        "animals/1.2.0 has no validation or test split, only train; divide it, such as with "
        "--train-split 'train[:90%]' --test-split 'train[90%:]'"
    )
    dataset = open_dataset("animals", data_dir=only_train, train_split="train[:90%]", test_split="train[90%:]")
    assert (shades(dataset.train), shades(dataset.test)) == (list(range(18)), [18, 19])
    assert dataset.notes == ()


def test_slices_equal_those_of_tfds(only_train: Path) -> None:
    builder: Any = tfds.builder_from_directory(only_train / "animals" / "1.2.0")
    for split in ("train", "train[3:7]", "train[-25%:]", "train[:2]+train[10:12]"):
        theirs = [example["image"][0, 0, 0] // 10 for example in builder.as_data_source(split)]
        ours = open_dataset("animals", data_dir=only_train, test_split=split, evaluation_only=True).test
        assert shades(ours) == theirs, split
        assert [ours[i].label for i in range(len(ours))] == [LABELS[shade] for shade in theirs]


def test_images_in_both_splits_are_counted_in_a_warning(only_train: Path) -> None:
    dataset = open_dataset("animals", data_dir=only_train, test_split="train[75%:]")
    assert dataset.notes == ("5 of 5 evaluation images (train[75%:]) are also training images (train)",)
    dataset = open_dataset("animals", data_dir=only_train, train_split="train[:16]", test_split="train[15:]")
    assert dataset.notes == ("1 of 5 evaluation images (train[15:]) are also training images (train[:16])",)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian", r"has no split 'trian', only train"),
        ("train[:10", r"cannot take the split 'train\[:10' of animals/1\.2\.0 \(Error parsing split "),
        ("train[:0]", r"cannot take the split 'train\[:0\]' of animals/1\.2\.0 \("),
    ],
)
def test_a_missing_split_is_one_line(only_train: Path, split: str, message: str) -> None:
    cases: list[dict[str, Any]] = [dict(test_split=split), dict(train_split=split, test_split="train")]
    for options in cases:
        with pytest.raises(DataError, match=message) as caught:
            open_dataset("animals", data_dir=only_train, **options)
        assert "\n" not in str(caught.value)


def test_a_split_without_labels_is_refused_at_the_start(tmp_path: Path) -> None:
    build(tmp_path, train=LABELS, test=[-1] * 5)
    net = write_variant(tmp_path, SMALL)
    options = ("--preset", "imagenet_120", "--model", net, "--data", "animals", "--data-dir", tmp_path)
    workdir = tmp_path / "run"
    done = command("train.main", *options, "--batch-size", 4, "--workdir", workdir)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: animals/1.2.0/test has no labels; choose another split (--train-split, --test-split)\n"
    )
    assert not workdir.exists()


def test_the_options_reach_both_commands(only_train: Path, tmp_path: Path) -> None:
    model = rv.create_model(SMALL, 4)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model), class_names=CLASSES)
    evaluated = ("train.evaluate", "animals", "train", tmp_path / "w.safetensors", "--data-dir", only_train)
    done = command(*evaluated, "--test-split", "train[12:]")
    assert json.loads(done.stdout)["images"] == 8, done.stderr
    options = (
        "--preset",
        "imagenet_120",
        "--model",
        tmp_path / "w.safetensors",
        "--data",
        "animals",
        "--data-dir",
        only_train,
    )
    splits = ("--train-split", "train[:8]", "--test-split", "train[8:]", "--batch-size", 12)
    done = command("train.main", *options, *splits, "--workdir", tmp_path / "run")
    assert done.stderr == "error: 8 training images do not fill one batch of 12; use a smaller batch size\n"


def test_splits_of_other_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    for spec in ("synthetic", str(tmp_path)):
        with pytest.raises(DataError, match=r"--test-split train\[:5\] is for TFDS data sets"):
            open_dataset(spec, test_split="train[:5]")
    digits = open_dataset(
        "digits", image_size=8, data_dir=tmp_path, train_split="train[:50%]", test_split="train[50%:]"
    )
    assert abs(len(digits.train) - len(digits.test)) <= 1


# Builds that are missing or incomplete


def test_an_unfinished_build_is_named(tmp_path: Path) -> None:
    folder = build(tmp_path, train=LABELS)
    folder.rename(folder.with_name("1.2.0.incompleteX7Y8Z9"))
    with pytest.raises(
        DataError, match=r"the build of .* 'animals' is unfinished \(.*1\.2\.0\.incompleteX7Y8Z9\); wait"
    ):
        open_dataset("animals", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "animals")
    (tmp_path / "animals" / "1.2.0").mkdir(parents=True)
    with pytest.raises(DataError, match=r"animals holds no finished build of the TFDS data set 'animals'; build it"):
        open_dataset("animals", data_dir=tmp_path)


def test_a_build_that_does_not_record_its_splits_is_named(tmp_path: Path) -> None:
    folder = build(tmp_path, train=LABELS)
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    del info["splits"]
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(DataError, match=r"1\.2\.0 holds no splits: its build is unfinished"):
        open_dataset("animals", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["animals:9.9.9", "animals/big", "animals/big:1.2.0", "animal", "animals_"])
def test_a_suggested_name_exists_and_differs_from_the_given_one(only_train: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(name, data_dir=only_train)
    proposed = str(caught.value).rpartition("did you mean ")[2].rstrip("?").split(" or ")
    assert name not in proposed
    assert proposed[0].startswith("animals")
    assert len(open_dataset(proposed[0], data_dir=only_train, test_split="train", evaluation_only=True).test) == 20
