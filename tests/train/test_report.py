"""Claim: `train.evaluate --report` counts like scikit-learn, and its files name the images that they describe."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, classification_report, confusion_matrix

import repvgg_jax as rv
from tests.helpers.batches import Numbers
from tests.helpers.commands import command
from tests.helpers.photos import write_photos
from tests.helpers.random_weights import random_variables
from train.evaluate import Evaluation
from train.report import NamedSource, write_report
from train.step import make_eval_step, predictor_step

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), image_size=32)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Labelled(Numbers):
    """Images with given labels and names."""

    def __init__(self, labels: np.ndarray, names: list[str]):
        super().__init__(len(labels))
        self.labels, self.class_names = labels, names

    def __getitem__(self, index: int, /):
        example = super().__getitem__(index)
        return type(example)(example.image, int(self.labels[index]), example.name)


def report_of(
    folder: Path, labels: np.ndarray, predictions: np.ndarray, names: list[str], unread: tuple[int, ...] = ()
):
    source = NamedSource(Labelled(labels, names))
    indices = np.array([i for i in range(len(labels)) if i not in unread])
    for index in range(len(labels)):
        source[index]
    probabilities = np.random.default_rng(1).uniform(0.3, 1, len(indices)).astype(np.float32)
    evaluation = Evaluation(0.5, 1.0, 2.0, len(indices), len(unread), predictions[indices], probabilities, indices)
    write_report(folder, evaluation, source, rv.Preprocessing(8, 1.0), {"weights": "w"})
    return indices, probabilities


def test_figures_equal_scikit_learns(tmp_path):
    """With a class that is never predicted, one without images, and one with neither."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3], 120)
    predictions = np.where(rng.random(120) < 0.6, labels, rng.choice([0, 1, 3, 4], 120))
    predictions[predictions == 2] = 3
    names = ["cat", "dog, wet", 'the "$x$"', "été 寺", "d", "e"]
    indices, probabilities = report_of(tmp_path / "r", labels, predictions, names, unread=(5, 77))
    labels, predictions = labels[indices], predictions[indices]

    with (tmp_path / "r" / "confusion.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["label", *names]
    assert [row[0] for row in rows[1:]] == names
    counts = confusion_matrix(labels, predictions, labels=range(6))
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], int), counts)

    undefined: Any = np.nan  # scikit-learn's annotation omits numbers
    expected: Any = classification_report(
        labels, predictions, labels=range(6), target_names=names, output_dict=True, zero_division=undefined
    )
    report = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    figures = {"precision": "precision", "recall": "recall", "f1": "f1-score", "images": "support"}
    rows = table(tmp_path / "r" / "per_class.csv")
    for row, entry, name in zip(rows, report["classes"], names, strict=True):
        assert row["name"] == entry["name"] == name
        for ours, theirs in figures.items():
            value = float("nan") if entry[ours] is None else entry[ours]
            np.testing.assert_allclose(value, expected[name][theirs], rtol=1e-12, err_msg=f"{name} {ours}")
            assert row[ours] == ("" if entry[ours] is None else str(entry[ours]))
    assert (rows[2]["precision"], rows[4]["recall"], rows[5]["f1"]) == ("", "", "")
    assert report["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert (report["images"], report["skipped"], report["weights"], report["loss"]) == (118, 2, "w", 2.0)

    mistaken = confusion_matrix(labels, predictions, labels=range(6)) * (1 - np.eye(6, dtype=int))
    top = report["confusions"][0]
    assert top["images"] == mistaken.max() == mistaken[names.index(top["label"]), names.index(top["prediction"])]
    assert sum(pair["images"] for pair in report["confusions"]) == mistaken.sum()

    rows = table(tmp_path / "r" / "predictions.csv")
    assert [row["image"] for row in rows] == [f"number {index}" for index in indices]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [names.index(row["prediction_name"]) for row in rows] == predictions.tolist()
    wrong = sorted(
        (-p, f"number {i}")
        for i, p in zip(indices[labels != predictions], probabilities[labels != predictions], strict=True)
    )
    assert [mistake["image"] for mistake in report["mistakes"]] == [name for _, name in wrong[:32]]
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "r" / name) as picture:
            picture.load()
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_many_classes_no_mistake_and_a_second_report_in_the_same_folder(tmp_path):
    labels = np.arange(150)
    names = [f"class {index}" for index in range(150)]
    for _ in range(2):
        report_of(tmp_path / "r", labels, labels, names)
    report = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    assert (report["mean_class_accuracy"], report["mean_f1"], report["mistakes"], report["confusions"]) == (
        1,
        1,
        [],
        [],
    )
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        *("confusion.csv", "confusion.png", "mistakes.png", "per_class.csv", "predictions.csv", "report.json")
    ]


@pytest.fixture
def photos(tmp_path) -> Path:
    write_photos(tmp_path / "photos" / "val", 9)
    (tmp_path / "photos" / "val" / "garden" / "001-broken.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path) -> Path:
    model = rv.create_model(SMALL, 2)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model), class_names=("garden", "pagoda"))
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_every_image_has_the_prediction_of_predict(form, photos, weights, tmp_path):
    folder = tmp_path / "report"
    done = command("train.evaluate", photos, form, weights, "--report", folder, "-b", 4)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert summary == {name: report[name] for name in ("top1", "top5", "images")}
    assert (report["images"], report["skipped"], report["form"]) == (9, 1, form)
    rows = table(folder / "predictions.csv")
    assert [row["label_name"] for row in rows] == [Path(row["image"]).parent.name for row in rows]
    assert np.mean([int(row["correct"]) for row in rows]) == pytest.approx(summary["top1"])
    assert all((row["label"] == row["prediction"]) == (row["correct"] == "1") for row in rows)

    done = command("repvgg_jax.__main__", "predict", weights, photos / "val", "--top", 1, "--format", "csv")
    answers = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["image"], row["prediction"], row["prediction_name"]) for row in rows] == [
        (answer["image"], answer["class"], answer["name"]) for answer in answers
    ]
    actual, expected = ([float(row["probability"]) for row in side] for side in (rows, answers))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_a_predictor_on_one_device_agrees_with_the_model(weights):
    """For classes, probabilities and sums; the commands of these tests run on four devices, which use the model."""
    (model, variables), preprocessing = rv.load_weights(weights), rv.Preprocessing(32, 1.0)
    predict = rv.make_predictor(model, variables, 6, 32, preprocessing=preprocessing)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 2, 6).astype(np.int32),
        "mask": np.array([1, 1, 0, 1, 1, 0], np.float32),
    }
    expected = jax.jit(make_eval_step(model, preprocessing))(variables, batch)
    actual = predictor_step(predict)({}, {name: array[None] for name, array in batch.items()})
    assert actual.keys() == expected.keys()
    logits = np.float64(predict(batch["image"]))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(actual["probability"][0], shares.max(1), rtol=1e-5)
    for name in expected:
        np.testing.assert_allclose(np.ravel(actual[name]), np.ravel(expected[name]), rtol=1e-4, err_msg=name)


def test_a_tilde_that_the_shell_did_not_expand_is_the_home_folder(photos, weights, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    done = command("train.evaluate", photos, "deploy", weights, "--report=~/report")
    assert done.returncode == 0, done.stderr
    assert (home / "report" / "report.json").is_file()


def test_an_unwritable_report_is_an_error_before_the_evaluation(photos, weights, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder, words in ((tmp_path / "file", "it is not a folder"), (tmp_path / "no" / "r", "there is no folder")):
        done = command("train.evaluate", photos, "deploy", weights, "--report", folder)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"
