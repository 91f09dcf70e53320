"""Claim: a user's mistake is one line on stderr that says what and where, exit status 2, and nothing half-written."""

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import random_variables
from data_helpers import PHOTO, encode, write_photos
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.variants import VARIANTS

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: its status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(module: str, *arguments: object) -> Done:
    """`python -m MODULE …`, in this process."""
    main = importlib.import_module(module).main
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = [module, *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            run_command(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def mistake(module: str, *arguments: object) -> str:
    """The one line that a user's mistake leaves on stderr."""
    done = command(module, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def train(*arguments: object) -> str:
    return mistake("train.main", "--preset", "digits", *arguments)


def evaluate(*arguments: object) -> str:
    return mistake("train.evaluate", *arguments)


def predict(*arguments: object) -> str:
    return mistake("repvgg_jax.__main__", "predict", *arguments)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of photographs in two classes."""
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 6, offset=20)
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A native training-form file of a small net with two classes."""
    monkeypatch.setitem(VARIANTS, "Small", SMALL)
    model = rv.create_model(SMALL, 2)
    path = tmp_path / "small.safetensors"
    rv.save_weights(path, model, random_variables(model), class_names=("garden", "pagoda"))
    return path


def test_options_that_make_no_sense(tmp_path):
    folder = ("--workdir", tmp_path / "run", "--data-dir", tmp_path)
    assert "unknown model 'RepVGG-A9'; did you mean" in train("--model", "RepVGG-A9", *folder)
    assert "--image-size must be at least 1, not 0" in train("--image-size", 0, *folder)
    assert "--learning-rate must be at least 0, not nan" in train("--learning-rate", "nan", *folder)
    assert "--momentum must be below 1, not 1.0" in train("--momentum", 1, *folder)
    assert "leaves nothing of 3 --epochs" in train("--epochs", 3, "--warmup-epochs", 3, *folder)
    assert "--batch-size 6 cannot be shared by 4 devices; 4 could" in train("--batch-size", 6, *folder)
    assert "4 devices in 3 portions each; 60 could" in train("--batch-size", 64, "--accumulate", 3, *folder)
    assert "--coordinator-address, --num-processes and --process-id go together" in train("--process-id", 0, *folder)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_or_not_right(tmp_path, photos):
    folder = ("--workdir", tmp_path / "run", "--data-dir", tmp_path, "--batch-size", 4)
    assert "/none does not exist; give a folder" in train("--data", tmp_path / "none", *folder)
    assert "did you mean" in train("--data", "imagenet2013", *folder)
    assert "is not prepared under" in train("--data", "imagenet2012", *folder)
    assert "8 training images do not fill one batch of 12" in train("--data", photos, *folder[:-1], 12)
    (photos / "train" / "empty").mkdir()
    assert "class folder" in (said := train("--data", photos, *folder))
    assert "empty holds no images" in said
    (photos / "train" / "empty" / "a.jpg").write_bytes(encode(PHOTO, "JPEG"))
    assert "hold different classes (only in train/: empty)" in train("--data", photos, *folder)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_used(tmp_path, photos):
    (tmp_path / "file").write_text("x")
    arguments = ("--data", photos, "--batch-size", 4)
    assert "cannot create --workdir" in train("--workdir", tmp_path / "file" / "run", *arguments)
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json is damaged" in train("--workdir", tmp_path / "run", *arguments)


def test_weights_to_start_from_that_do_not_fit(tmp_path, photos, weights):
    folder = ("--data", photos, "--batch-size", 4, "--workdir", tmp_path / "run")
    assert "holds Small, not RepVGG-A0" in train("--init", weights, *folder)
    deploy = tmp_path / "deploy.safetensors"
    rv.save_weights(deploy, *rv.to_deploy(*rv.load_weights(weights)))
    assert "is in deploy form, which cannot be trained" in train("--init", deploy, "--model", "Small", *folder)


def test_evaluation_of_what_does_not_fit(tmp_path, photos, weights):
    assert "does not exist" in evaluate(photos, "train", tmp_path / "none.safetensors")
    assert "holds Small, not RepVGG-A0" in evaluate(photos, "train", weights, "-a", "RepVGG-A0")
    assert "unknown model" in evaluate(photos, "train", weights, "-a", "nonsense")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    assert "cannot read" in evaluate(photos, "train", damaged)
    deploy = tmp_path / "deploy.safetensors"
    rv.save_weights(deploy, *rv.to_deploy(*rv.load_weights(weights)))
    assert "is in deploy form" in evaluate(photos, "train", deploy)
    for name in ("train", "val"):
        (photos / name / "third").mkdir()
        (photos / name / "third" / "a.jpg").write_bytes(encode(PHOTO, "JPEG"))
    assert "has 2 classes, but" in (said := evaluate(photos, "deploy", weights))
    assert "has 3" in said


def test_evaluation_gives_one_json_object_for_both_forms(photos, weights):
    (photos / "val" / "garden" / "broken.jpg").write_bytes(b"no image")
    results = []
    for form in ("train", "deploy"):
        done = command("train.evaluate", photos, form, weights, "-a", "Small")
        assert done.returncode == 0, done.stderr
        assert "1 images could not be read and were skipped" in done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert results[0] == results[1]
    assert results[0]["images"] == 6
    assert results[0]["top5"] == 1.0
    assert "broken.jpg" in evaluate(photos, "train", weights, "--strict")


def test_prediction_names_the_classes(tmp_path, weights):
    Image.fromarray(np.asarray(PHOTO)[:100, :120]).save(tmp_path / "a.png")
    done = command("repvgg_jax.__main__", "predict", weights, tmp_path / "a.png", tmp_path / "a.png", "--top", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{tmp_path / 'a.png'}: ") and line.endswith(" %") for line in lines)
    assert lines[0].split()[1] in ("garden", "pagoda")


def test_prediction_of_what_is_no_image(tmp_path, weights):
    (tmp_path / "text.png").write_text("hello")
    assert "no image given" in predict(weights)
    assert "text.png: cannot be read as an image" in predict(weights, tmp_path / "text.png")
    assert "none.png: No such file" in predict(weights, tmp_path / "none.png")


def test_summary_of_an_unknown_model():
    assert "unknown model 'RepVGG-C1'" in mistake("repvgg_jax.__main__", "summary", "RepVGG-C1")
    done = command("repvgg_jax.__main__", "summary", "RepVGG-A0", "RepVGG-B3")
    assert done.returncode == 0
    assert "8.30 [8.30]" in done.stdout
    assert "110.96 [110.96]" in done.stdout


def test_curves_of_what_is_no_run(tmp_path):
    assert "no run given" in mistake("train.plot")
    assert "holds no metrics.jsonl" in mistake("train.plot", tmp_path)
