"""Claim: a user's mistake is one line on stderr that says what and where, exit status 2, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.preprocess import eval_transform, normalize
from tests.helpers.architecture import write_variant
from tests.helpers.commands import command
from tests.helpers.data import PHOTO, encode, write_photos
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)


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
def weights(tmp_path) -> Path:
    """A native training-form file of a small net with two classes."""
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
    (tmp_path / "file").write_text("x", encoding="utf-8")
    arguments = ("--data", photos, "--batch-size", 4)
    assert "cannot create --workdir" in train("--workdir", tmp_path / "file" / "run", *arguments)
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is damaged" in train("--workdir", tmp_path / "run", *arguments)


def test_weights_to_start_from_that_do_not_fit(tmp_path, photos, weights):
    folder = ("--data", photos, "--batch-size", 4, "--workdir", tmp_path / "run")
    assert "holds Small, not RepVGG-A0" in train("--init", weights, *folder)
    deploy = tmp_path / "deploy.safetensors"
    rv.save_weights(deploy, *rv.to_deploy(*rv.load_weights(weights)))
    assert "is in deploy form, which cannot be trained" in train("--init", deploy, "--model", weights, *folder)


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


def test_evaluation_gives_one_json_object_for_both_forms(tmp_path, photos, weights):
    (photos / "val" / "garden" / "broken.jpg").write_bytes(b"no image")
    results = []
    for form in ("train", "deploy"):
        done = command("train.evaluate", photos, form, weights, "-a", write_variant(tmp_path, SMALL))
        assert done.returncode == 0, done.stderr
        assert "1 image could not be read and was skipped" in done.stderr
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
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
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


OUT_OF_RANGE = {
    "--image-size": (99999999, "must be at most 4096, not 99999999"),
    "--test-image-size": (0, "must be at least 1, not 0"),
    "--epochs": (0, "must be at least 1, not 0"),
    "--batch-size": (0, "must be at least 1, not 0"),
    "--workers": (0, "must be at least 1, not 0"),
    "--prefetch": (0, "must be at least 1, not 0"),
    "--learning-rate": ("inf", "must be finite, not inf"),
    "--weight-decay": (-0.1, "must be at least 0, not -0.1"),
    "--auxiliary-weight": ("nan", "must be at least 0, not nan"),
    "--label-smoothing": (1, "must be below 1, not 1.0"),
    "--ema-decay": (1, "must be below 1, not 1.0"),
    "--dense-copies": (9, "must be at most 8, not 9"),
    "--dropout": (1, "must be below 1, not 1.0"),
    "--freeze-stages": (6, "must be at most 5, not 6"),
    "--seed": (2**63, "must be below 2^63"),
    "--log-every": (0, "must be at least 1, not 0"),
    "--evaluate-every": (-1, "must be at least 1, not -1"),
    "--checkpoint-every": (0, "must be at least 1, not 0"),
    "--keep-checkpoints": (0, "must be at least 1, not 0"),
}


@pytest.mark.parametrize("option", list(OUT_OF_RANGE))
def test_options_out_of_range_are_named(option, tmp_path):
    value, says = OUT_OF_RANGE[option]
    said = train(option, value, "--workdir", tmp_path / "run", "--data-dir", tmp_path)
    assert f"{option} {says}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("train.main", "--preset", "nonsense"),
        ("train.main", "--preset", "digits", "--epochs", "many"),
        ("train.main", "--preset", "digits", "--no-such-option"),
        ("train.evaluate", "photos", "fused", "weights.pth"),
        ("train.evaluate", "photos", "train"),
        ("repvgg_jax.__main__", "foresee"),
        ("repvgg_jax.__main__", "predict"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_parsed_ends_with_status_2_too(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_images_that_are_none(tmp_path, photos, weights):
    """One among others is skipped and named; with --strict, or if there are no others, the run ends."""
    small = ("--model", weights, "--image-size", 32, "--test-image-size", 32, "--data", photos, "--batch-size", 4)
    broken = photos / "train" / "garden" / "broken.jpg"
    broken.write_bytes(b"no image")
    done = command("train.main", "--preset", "digits", *small, "--workdir", tmp_path / "run", "--strict")
    assert done.returncode == 2, done
    assert done.stderr == f"error: {broken}: cannot be read as an image (no known image format)\n"
    for path in (photos / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    done = command("train.main", "--preset", "digits", *small, "--workdir", tmp_path / "run2")
    assert done.returncode == 2, done
    assert "none of the 9 images can be read" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("final.safetensors"))


def test_evaluation_options_and_data(tmp_path, photos, weights):
    assert "--batch-size must be at least 1, not 0" in evaluate(photos, "train", weights, "-b", 0)
    assert "--resolution must be at least 1, not 0" in evaluate(photos, "train", weights, "-r", 0)
    assert "--resolution must be at most 16384, not 99999999" in evaluate(photos, "train", weights, "-r", 99999999)
    assert "--workers must be at least 1, not 0" in evaluate(photos, "train", weights, "--workers", 0)
    assert "/none does not exist; give a folder" in evaluate(tmp_path / "none", "train", weights)
    assert f"{photos / 'val'} holds no val/" in evaluate(photos / "val", "train", weights)
    assert "is a file, not a folder" in evaluate(weights, "train", weights)


def test_weights_for_images_of_four_channels(tmp_path, photos):
    model = rv.create_model(SMALL, 2)
    path = tmp_path / "four.safetensors"
    rv.save_weights(path, model, random_variables(model, in_channels=4))
    picture = next((photos / "val" / "garden").iterdir())
    for said in (predict(path, picture), evaluate(photos, "train", path)):
        assert said == f"error: {path} takes 4 channels; image files have 1 or 3\n"


def test_prediction_gives_the_most_likely_classes_first(tmp_path, weights):
    picture = tmp_path / "a.png"
    PHOTO.crop((0, 0, 90, 60)).save(picture)
    model, variables = rv.load_weights(weights)
    info = rv.inspect_weights(weights)
    pixels = eval_transform(PHOTO.crop((0, 0, 90, 60)), info.preprocessing)
    logits = np.asarray(model.apply(variables, normalize(pixels[None], info.preprocessing)), np.float64)[0]
    shares = 100 * np.exp(logits) / np.exp(logits).sum()
    ranked = [f"{('garden', 'pagoda')[i]} {shares[i]:.1f} %" for i in np.argsort(-shares)]
    assert abs(shares[0] - shares[1]) > 1, "too close to tell the order"

    done = command("repvgg_jax.__main__", "predict", weights, picture)
    assert done.stdout == f"{picture}: {', '.join(ranked)}\n"
    rv.save_weights(tmp_path / "deploy.safetensors", *rv.to_deploy(model, variables))
    done = command("repvgg_jax.__main__", "predict", tmp_path / "deploy.safetensors", picture, "--top", 1)
    assert done.stdout == f"{picture}: class {int(np.argmax(shares))} {shares.max():.1f} %\n"


def test_predictions_that_cannot_be_made(tmp_path, weights):
    PHOTO.crop((0, 0, 90, 60)).save(tmp_path / "a.png")
    assert "--top must be at least 1, not 0" in predict(weights, tmp_path / "a.png", "--top", 0)
    assert "--batch-size must be at least 1, not 0" in predict(weights, tmp_path / "a.png", "--batch-size", 0)
    assert "is a folder, not a weight file" in predict(tmp_path, tmp_path / "a.png")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    assert "cannot read" in predict(tmp_path / "cut.safetensors", tmp_path / "a.png")
    Image.new("RGB", (100_000, 1)).save(tmp_path / "thread.png")
    assert f"{tmp_path / 'thread.png'}: " in (said := predict(weights, tmp_path / "thread.png"))
    assert "too elongated" in said


def test_summary_options():
    assert "image_size must be at least 1, not 0" in mistake("repvgg_jax.__main__", "summary", "--image-size", 0)
    assert "num_classes must be at least 1, not -1" in mistake("repvgg_jax.__main__", "summary", "--num-classes", -1)
    done = command("repvgg_jax.__main__", "summary", "repvgg-a0", "-r", 112, "--num-classes", 10)
    assert "one 112x112 image, 10 classes" in done.stdout


def test_as_a_process_a_warning_is_one_line_too(tmp_path):
    """Of weights that nobody published, from a PyTorch file; the answer is on stdout all the same."""
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8)), 2)
    rv.save_weights(tmp_path / "w.pth", model, random_variables(model))
    PHOTO.crop((0, 0, 90, 60)).save(tmp_path / "a.png")
    words = [sys.executable, "-m", "repvgg_jax", "predict", str(tmp_path / "w.pth"), str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: class ")
    assert done.stderr.startswith(f"warning: {tmp_path / 'w.pth'} is no published variant")
    assert done.stderr.count("\n") == 1


def test_as_a_process_a_mistake_is_one_line():
    words = [sys.executable, "-m", "train.main", "--preset", "digits", "--batch-size", "6"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --batch-size 6 cannot be shared by 4 devices; 4 could\n"


@pytest.mark.parametrize(
    "module", ["repvgg_jax.__main__", "train.main", "train.evaluate", "train.plot", "convert.__main__"]
)
def test_every_command_says_its_version(module):
    done = command(module, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"repvgg-jax {rv.__version__} (jax ")
    assert done.stdout.count("\n") == 1
