"""Claim: `predict` prints answers while it reads files and folders, whatever they hold, for people and programs."""

import csv
import functools
import gc
import io
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import repvgg_jax as rv
from repvgg_jax import predict as predict_module
from repvgg_jax.__main__ import main
from repvgg_jax.cli import run_command
from repvgg_jax.predict import ImageReader
from repvgg_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, eval_transform, normalize
from repvgg_jax.weights.imagenet_classes import imagenet_class_names
from tests.helpers.commands import Done, command
from tests.helpers.comparison import relative_difference
from tests.helpers.photos import PHOTO
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), image_size=32)
NAMES = ("garden", 'a "pagoda", old', "été 寺")


def predict(*arguments: object) -> Done:
    return command("repvgg_jax.__main__", "predict", *arguments)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file of a small net with three classes, each of which is likely for some image."""
    model = rv.create_model(SMALL, 3)
    path = tmp_path / "small.safetensors"
    rv.save_weights(path, model, random_variables(model), class_names=NAMES)
    return path


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Five photographs at three depths, in the order in which `predict` reads a folder."""
    folder = tmp_path / "photos"
    files = [folder / name for name in ("a.png", "b.jpg", "in/c.PNG", "in/d.webp", "in/deep/e.bmp")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.crop((40 * number, 20 * number, 40 * number + 90, 20 * number + 60)).save(file)
    (folder / "notes.txt").write_text("not an image", encoding="utf-8")
    return files


class FakePredictor:
    """Gives each image its first pixel's red as score, and remembers which batches are still referenced."""

    def __init__(self):
        self.batches: list[weakref.ref] = []
        self.most_held = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        gc.collect()
        self.most_held = max(self.most_held, sum(ref() is not None for ref in self.batches))
        self.batches.append(weakref.ref(images))
        red = images[:, 0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
        return np.stack([red, 1 - red, 0 * red], 1).astype(np.float32)


@pytest.fixture
def fake(monkeypatch) -> FakePredictor:
    """Replaces the compiled net in tests of what happens before and after it."""
    predictor = FakePredictor()
    monkeypatch.setattr(predict_module, "make_predictor", lambda *_, **__: predictor)
    return predictor


def test_folders_are_read_recursively_and_answers_are_the_models(weights, photos):
    done = predict(weights, photos[0].parent, photos[0], "--batch-size", 2, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    files = [*photos, photos[0]]
    assert [answer["image"] for answer in answers] == list(map(str, files))
    (model, variables), preprocessing = rv.load_weights(weights), rv.inspect_weights(weights).preprocessing
    pixels = np.stack([eval_transform(Image.open(file).convert("RGB"), preprocessing) for file in files])
    logits = np.float64(jax.jit(model.apply)(variables, normalize(pixels, preprocessing)))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for answer, row in zip(answers, shares, strict=True):
        probabilities = {p["class"]: p["probability"] for p in answer["predictions"]}
        np.testing.assert_allclose([probabilities[i] for i in range(3)], row, rtol=1e-4)
        assert list(probabilities) == np.argsort(-row).tolist()
        assert all(p["name"] == NAMES[p["class"]] for p in answer["predictions"])


def test_at_most_one_batch_is_held(fake, weights, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(folder / f"{number:02}.png")
    done = predict(weights, folder, "-b", 4)
    assert len(done.stdout.splitlines()) == 24
    assert len(fake.batches) == 6
    assert fake.most_held <= 1  # the previous batch, still referenced by the loop variable


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_answers_are_printed_before_the_last_image_is_read(weights, photos, tmp_path):
    """The third image is a pipe that is never written to: the answers for the images before it must be printed."""
    pipe = tmp_path / "slow.png"
    os.mkfifo(pipe)
    words = [
        sys.executable,
        "-m",
        "repvgg_jax",
        "predict",
        weights,
        *photos[:2],
        pipe,
        "--batch-size",
        "2",
        "--top",
        "1",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in photos[:2]]
        pipe.write_bytes(photos[2].read_bytes())
        last = process.stdout.read()
    assert process.returncode == 0
    lines = [*first, last]
    for line, file in zip(lines, [*photos[:2], pipe], strict=True):
        assert line.startswith(f"{file}: ".encode())
    assert [line[-4:] for line in lines] == [line[-4:] for line in lines if line.endswith(b" %\n")]


@pytest.mark.usefixtures("fake")
def test_an_unreadable_image_is_named_and_the_others_are_answered(weights, photos, tmp_path):
    broken, missing, empty, thin = (tmp_path / name for name in ("broken.jpg", "none.png", "empty", "thin.png"))
    broken.write_bytes(photos[1].read_bytes()[:300])
    empty.mkdir()
    Image.new("RGB", (100_000, 1)).save(thin)
    done = predict(weights, photos[0], broken, missing, empty, thin, photos[2], "-b", 1)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [str(photos[0]), str(photos[2])]
    named = done.stderr.splitlines()
    assert len(named) == 4
    for line, path, reason in zip(
        named,
        (broken, missing, empty, thin),
        ("cannot be read", "No such file", "holds no images", "too elongated"),
        strict=True,
    ):
        assert line.startswith(f"error: {path}")
        assert reason in line


def test_no_readable_image_is_an_error(fake, weights, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("hello", encoding="utf-8")
    done = predict(weights, tmp_path / "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'a.png'}: cannot be read as an image (no known image format)\n"
    for kind in ("text", "csv", "json"):
        done = predict(weights, tmp_path / "a.png", tmp_path / "b.png", "--format", kind)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == "error: none of the 2 images and folders could be read"
        assert done.stderr.count("\n") == 3
    (tmp_path / "empty").mkdir()
    done = predict(weights, tmp_path / "empty")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path / 'empty'} holds no images" in done.stderr
    assert not fake.batches


def test_a_net_whose_outputs_overflow_is_not_ranked(photos, tmp_path):
    model = rv.create_model(SMALL, 3)
    variables = random_variables(model)
    variables["params"]["linear"]["kernel"] = np.full_like(variables["params"]["linear"]["kernel"], 3e38)
    rv.save_weights(tmp_path / "huge.safetensors", model, variables)
    done = predict(tmp_path / "huge.safetensors", photos[0], photos[1])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == f"error: {photos[0]}: the net's outputs are not finite numbers"


@pytest.mark.usefixtures("fake")
def test_csv_and_json_agree_with_the_text(weights, photos, tmp_path):
    odd = tmp_path / 'a "b", c.png'
    odd.write_bytes(photos[0].read_bytes())
    files = [photos[2], odd]
    text, table, lines = (predict(weights, *files, "--top", 2, "--format", f).stdout for f in ("text", "csv", "json"))
    rows = list(csv.DictReader(io.StringIO(table)))
    assert table.startswith("image,rank,class,name,probability\n")
    assert [(row["image"], row["rank"]) for row in rows] == [(str(file), rank) for file in files for rank in "12"]
    objects = [json.loads(line) for line in lines.splitlines()]
    flat = [(o["image"], p["class"], p["name"], p["probability"]) for o in objects for p in o["predictions"]]
    assert flat == [(r["image"], int(r["class"]), r["name"], float(r["probability"])) for r in rows]
    expected = [
        f"{file}: " + ", ".join(f"{r['name']} {100 * float(r['probability']):.1f} %" for r in rows[2 * i : 2 * i + 2])
        for i, file in enumerate(files)
    ]
    assert text.splitlines() == expected


@pytest.mark.usefixtures("fake")
def test_classes_without_names_are_numbered(photos, tmp_path):
    model = rv.create_model(SMALL, 3)
    path = tmp_path / "nameless.safetensors"
    rv.save_weights(path, model, random_variables(model))
    answer = json.loads(predict(path, photos[0], "--top", 1, "--format", "json").stdout)["predictions"][0]
    assert answer["name"] is None
    (row,) = csv.DictReader(io.StringIO(predict(path, photos[0], "--top", 1, "--format", "csv").stdout))
    assert (row["name"], int(row["class"])) == ("", answer["class"])
    assert f": class {answer['class']} " in predict(path, photos[0], "--top", 1).stdout


def test_a_net_of_1000_classes_without_names_gets_imagenets(photos, tmp_path):
    """Such as a file of the authors or of timm."""
    model = rv.create_model(SMALL, 1000)
    path = tmp_path / "nameless.pth"
    rv.save_weights(path, model, random_variables(model))
    Path(f"{path}.json").unlink(missing_ok=True)
    answers = json.loads(predict(path, photos[0], "--top", 1000, "--format", "json").stdout)["predictions"]
    names = [answer["name"] for answer in sorted(answers, key=lambda answer: answer["class"])]
    assert tuple(names) == imagenet_class_names()
    assert names[0] == "tench"
    named = predict(path, photos[0], "--top", 1, "--class-names", names_file(tmp_path, 1000)).stdout
    assert f": mine {answers[0]['class']} " in named


def names_file(folder: Path, count: int) -> Path:
    path = folder / "names.txt"
    path.write_text("".join(f"mine {index}\n" for index in range(count)), encoding="utf-8")
    return path


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("encoding", ["gbk", "euc_jp", "ascii", "latin-1", "utf-8"])
def test_a_class_name_that_stdout_cannot_show_is_escaped(encoding, weights, photos, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["predict", "predict", str(weights), str(photos[0])])
    run_command(main)
    sys.stdout.flush()
    assert NAMES[2].encode(encoding, "backslashreplace") in raw.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_photographs_are_turned_upright(orientation, suffix, tmp_path):
    """As PIL's `exif_transpose` turns them; the crop is that of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    PHOTO.crop((30, 20, 190, 100)).save(path, exif=exif)
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    if orientation > 4 and suffix != "tif":  # PIL turns a TIFF itself when it loads it
        assert upright.size == (80, 160)
    side = 80
    ((_, pixels),) = ImageReader((str(path),), rv.Preprocessing(side, 1.0)).batches(1)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    np.testing.assert_array_equal(pixels[0], np.asarray(upright.crop((left, top, left + side, top + side))))


def test_embeddings_are_the_models_in_the_printed_order(weights, photos, tmp_path):
    broken, out = tmp_path / "broken.png", tmp_path / "features.npy"
    broken.write_bytes(b"no image")
    readable = [photos[0], photos[3], photos[1]]
    done = predict(weights, photos[0], broken, photos[3], photos[1], "-b", 2, "--embeddings", out)
    assert done.returncode == 1
    assert done.stdout.splitlines() == list(map(str, readable))
    assert done.stderr.startswith(f"error: {broken}: ")
    (model, variables), preprocessing = rv.load_weights(weights), rv.inspect_weights(weights).preprocessing
    pixels = np.stack([eval_transform(Image.open(file).convert("RGB"), preprocessing) for file in readable])
    embed = jax.jit(functools.partial(model.apply, method="embed"))
    embeddings = np.load(out)
    assert embeddings.dtype == np.float32
    assert relative_difference(embed(variables, normalize(pixels, preprocessing)), embeddings) <= 1e-5


@pytest.mark.usefixtures("fake")
def test_embeddings_as_csv_are_the_same_numbers(weights, photos, tmp_path):
    for suffix in (".npy", ".csv"):
        assert predict(weights, photos[0].parent, "-b", 2, "--embeddings", tmp_path / f"out{suffix}").returncode == 0
    embeddings = np.load(tmp_path / "out.npy")
    assert embeddings.shape == (5, 3)
    assert len(np.unique(embeddings)) > 3
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["image", "0", "1", "2"]
    assert [row[0] for row in rows[1:]] == list(map(str, photos))
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], np.float32), embeddings)


@pytest.mark.usefixtures("fake")
def test_a_net_without_a_classifier_has_embeddings_and_no_predictions(photos, tmp_path):
    model = rv.create_model("RepVGG-A0")
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    rv.save_weights(tmp_path / "whole.pth", model, variables)
    state = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save({key: tensor for key, tensor in state.items() if "linear" not in key}, tmp_path / "body.pth")
    done = predict(tmp_path / "body.pth", photos[0], "--embeddings", tmp_path / "out.npy")
    assert (done.returncode, done.stderr) == (0, "")
    done = predict(tmp_path / "body.pth", photos[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing: linear.weight, linear.bias" in done.stderr


def test_no_embeddings_file_is_written_after_an_error(fake, weights, photos, tmp_path):
    def refused(*arguments: object) -> str:
        done = predict(weights, photos[0], *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        return done.stderr

    before = sorted(tmp_path.rglob("*"))
    assert "the name must end in .npy or .csv" in refused("--embeddings", tmp_path / "a.txt")
    assert "there is no folder" in refused("--embeddings", tmp_path / "none" / "a.npy")
    assert "remove --format" in refused("--embeddings", tmp_path / "a.npy", "--format", "csv")
    done = predict(weights, tmp_path / "none.png", "--embeddings", tmp_path / "a.npy")
    assert done.returncode == 2
    assert "none.png: No such file" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert not fake.batches


@pytest.mark.usefixtures("fake")
def test_out_of_range_options_are_named(weights, photos):
    for option in ("--top", "--batch-size"):
        done = predict(weights, photos[0], option, 0)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {option} must be at least 1, not 0\n"
