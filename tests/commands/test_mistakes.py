"""Claim: a user's mistake gets one line on stderr that says what and where, exit status 2, and no half-written file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.preprocess import eval_transform, normalize
from tests.helpers.architecture import write_variant
from tests.helpers.commands import command, error_of
from tests.helpers.photos import PHOTO, encode, write_photos
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT
from tests.helpers.xla_flags import xla_flags

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)


def train(workdir: Path, *arguments: object) -> str:
    """Return a training run's error; data sets prepared by name are looked for next to its workdir."""
    folders = ("--workdir", workdir, "--data-dir", workdir.parent)
    return error_of(command("train.main", "--preset", "digits", *folders, *arguments))


def evaluate(*arguments: object) -> str:
    """Return the error of an evaluation."""
    return error_of(command("train.evaluate", *arguments))


def predict(*arguments: object) -> str:
    """Return the error of a prediction."""
    return error_of(command("repvgg_jax.__main__", "predict", *arguments))


def summary(*arguments: object) -> str:
    """Return the error of a summary."""
    return error_of(command("repvgg_jax.__main__", "summary", *arguments))


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run's folder, which does not exist yet."""
    return tmp_path / "run"


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


def deployed(weights: Path) -> Path:
    """Write the deploy form next to a file of the training form."""
    path = weights.with_name("deploy.safetensors")
    rv.save_weights(path, *rv.to_deploy(*rv.load_weights(weights)))
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "RepVGG-A9"), "unknown model 'RepVGG-A9'; did you mean"),
        (("--image-size", 0), "--image-size must be at least 1, not 0"),
        (("--learning-rate", "nan"), "--learning-rate must be at least 0, not nan"),
        (("--momentum", 1), "--momentum must be below 1, not 1.0"),
        (("--epochs", 3, "--warmup-epochs", 3), "--warmup-epochs must be less than --epochs, 3, not 3"),
        (("--batch-size", 6), "--batch-size 6 is not a multiple of 4 devices; 4 is"),
        (("--batch-size", 64, "--accumulate", 3), "is not a multiple of 4 devices x --accumulate 3; 60 is"),
        (("--process-id", 0), "--coordinator-address, --num-processes and --process-id go together"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_invalid_training_options_are_named_before_anything_is_written(options, words, workdir):
    assert words in train(workdir, *options)
    assert not workdir.exists()


def test_missing_training_data_is_named_with_a_suggestion(workdir, tmp_path):
    assert "/none does not exist; give a folder" in train(workdir, "--data", tmp_path / "none")
    assert "did you mean" in train(workdir, "--data", "imagenet2013")
    assert "is not prepared under" in train(workdir, "--data", "imagenet2012")
    assert not workdir.exists()


def test_too_few_training_images_for_a_batch_are_counted(workdir, photos):
    error = train(workdir, "--data", photos, "--batch-size", 12)
    assert "8 training images do not fill one batch of 12" in error
    assert not workdir.exists()


def test_a_class_without_images_and_one_without_validation_images_are_named(workdir, photos):
    data = ("--data", photos, "--batch-size", 4)
    (photos / "train" / "empty").mkdir()
    error = train(workdir, *data)
    assert "class folder" in error
    assert "empty holds no images" in error
    (photos / "train" / "empty" / "a.jpg").write_bytes(encode(PHOTO, "JPEG"))
    assert "hold different classes (only in train/: empty)" in train(workdir, *data)
    assert not workdir.exists()


def test_an_unusable_workdir_is_named(workdir, photos):
    data = ("--data", photos, "--batch-size", 4)
    file = workdir.with_name("file")
    file.write_text("x", encoding="utf-8")
    # Its parent is a file, so data sets are looked for elsewhere.
    assert "cannot create --workdir" in train(file / "run", *data, "--data-dir", workdir.parent)
    (workdir / "checkpoints" / "10").mkdir(parents=True)
    (workdir / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is damaged" in train(workdir, *data)


def test_initial_weights_that_do_not_fit_are_named_with_the_reason(workdir, photos, weights):
    data = ("--data", photos, "--batch-size", 4)
    assert "holds Small, not RepVGG-A0" in train(workdir, *data, "--init", weights)
    error = train(workdir, *data, "--init", deployed(weights), "--model", weights)
    assert "is in deploy form, which cannot be trained" in error


def test_weights_that_cannot_be_evaluated_are_named_with_the_reason(tmp_path, photos, weights):
    assert "does not exist" in evaluate(photos, "train", tmp_path / "none.safetensors")
    assert "holds Small, not RepVGG-A0" in evaluate(photos, "train", weights, "-a", "RepVGG-A0")
    assert "unknown model" in evaluate(photos, "train", weights, "-a", "nonsense")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    assert "cannot read" in evaluate(photos, "train", damaged)
    assert "is in deploy form" in evaluate(photos, "train", deployed(weights))


def test_data_with_more_classes_than_the_weights_is_refused_with_both_numbers(photos, weights):
    for split in ("train", "val"):
        (photos / split / "third").mkdir()
        (photos / split / "third" / "a.jpg").write_bytes(encode(PHOTO, "JPEG"))
    with mock.patch("repvgg_jax.load_weights", side_effect=AssertionError):  # before anything is computed
        error = evaluate(photos, "deploy", weights)
        assert "has 2 classes, but" in error
        assert "has 3" in error
        assert "does not exist" in evaluate(photos / "none", "deploy", weights)


def test_evaluation_prints_one_json_object_for_either_form(tmp_path, photos, weights):
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


def test_files_that_are_not_images_are_named_by_predict(tmp_path, weights):
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    assert "no images given" in predict(weights)
    assert "text.png: cannot be read as an image" in predict(weights, tmp_path / "text.png")
    assert "none.png: No such file" in predict(weights, tmp_path / "none.png")


def test_summary_names_an_unknown_model():
    assert "unknown model 'RepVGG-C1'" in summary("RepVGG-C1")


def test_summary_counts_the_published_parameters():
    done = command("repvgg_jax.__main__", "summary", "RepVGG-A0", "RepVGG-B3")
    assert done.returncode == 0
    assert "8.30 [8.30]" in done.stdout
    assert "110.96 [110.96]" in done.stdout


def test_a_folder_without_a_run_has_no_curves_and_is_named(tmp_path):
    assert "no run given" in error_of(command("train.plot"))
    assert "holds no metrics.jsonl" in error_of(command("train.plot", tmp_path))


OUT_OF_RANGE = {
    "--image-size": (99999999, "must be at most 4096, not 99999999"),
    "--test-image-size": (0, "must be at least 1, not 0"),
    "--epochs": (0, "must be at least 1, not 0"),
    "--batch-size": (0, "must be at least 1, not 0"),
    "--workers": (0, "must be at least 1, not 0"),
    "--worker-processes": (0, "must be at least 1, not 0"),
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
def test_out_of_range_training_options_are_named(option, workdir, tmp_path):
    value, words = OUT_OF_RANGE[option]
    assert f"{option} {words}" in train(workdir, option, value)
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
def test_arguments_that_cannot_be_parsed_end_with_status_2_too(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_run(photos, weights) -> tuple[object, ...]:
    """Arguments of a training run of the small net on the photographs, all but its workdir."""
    sizes = ("--image-size", 32, "--test-image-size", 32, "--batch-size", 4)
    return ("train.main", "--preset", "digits", "--model", weights, "--data", photos, *sizes)


def test_with_strict_an_unreadable_training_image_ends_the_run(small_run, workdir, photos):
    broken = photos / "train" / "garden" / "broken.jpg"
    broken.write_bytes(b"no image")
    done = command(*small_run, "--workdir", workdir, "--strict")
    assert done.returncode == 2, done
    assert done.stderr == f"error: {broken}: cannot be read as an image (no known image format)\n"
    assert not list(workdir.parent.rglob("final.safetensors"))


def test_a_run_without_any_readable_training_image_ends(small_run, workdir, photos):
    images = list((photos / "train").rglob("*.jpg"))
    for path in images:
        path.write_bytes(b"no image")
    done = command(*small_run, "--workdir", workdir)
    assert done.returncode == 2, done
    assert f"none of the {len(images)} images can be read" in done.stderr.splitlines()[-1]
    assert not list(workdir.parent.rglob("final.safetensors"))


def test_out_of_range_evaluation_options_and_missing_data_are_named(tmp_path, photos, weights):
    assert "--batch-size must be at least 1, not 0" in evaluate(photos, "train", weights, "-b", 0)
    assert "--resolution must be at least 1, not 0" in evaluate(photos, "train", weights, "-r", 0)
    assert "--resolution must be at most 16384, not 99999999" in evaluate(photos, "train", weights, "-r", 99999999)
    assert "--workers must be at least 1, not 0" in evaluate(photos, "train", weights, "--workers", 0)
    assert "/none does not exist; give a folder" in evaluate(tmp_path / "none", "train", weights)
    assert f"{photos / 'val'} holds no val/" in evaluate(photos / "val", "train", weights)
    assert "is a file, not a folder" in evaluate(weights, "train", weights)


def test_weights_for_images_of_four_channels_are_refused_for_image_files(tmp_path, photos):
    model = rv.create_model(SMALL, 2)
    path = tmp_path / "four.safetensors"
    rv.save_weights(path, model, random_variables(model, in_channels=4))
    picture = next((photos / "val" / "garden").iterdir())
    for error in (predict(path, picture), evaluate(photos, "train", path)):
        assert error == f"error: {path} takes 4 channels; image files have 1 or 3\n"


def test_predict_lists_the_most_likely_classes_first(tmp_path, weights):
    picture = tmp_path / "a.png"
    PHOTO.crop((0, 0, 90, 60)).save(picture)
    model, variables = rv.load_weights(weights)
    info = rv.inspect_weights(weights)
    pixels = eval_transform(PHOTO.crop((0, 0, 90, 60)), info.preprocessing)
    logits = np.asarray(model.apply(variables, normalize(pixels[None], info.preprocessing)), np.float64)[0]
    shares = 100 * np.exp(logits) / np.exp(logits).sum()
    ranked = [f"{('garden', 'pagoda')[i]} {shares[i]:.1f} %" for i in np.argsort(-shares)]
    assert abs(shares[0] - shares[1]) > 1, "too close to determine the order"

    done = command("repvgg_jax.__main__", "predict", weights, picture)
    assert done.stdout == f"{picture}: {', '.join(ranked)}\n"
    rv.save_weights(tmp_path / "deploy.safetensors", *rv.to_deploy(model, variables))
    done = command("repvgg_jax.__main__", "predict", tmp_path / "deploy.safetensors", picture, "--top", 1)
    assert done.stdout == f"{picture}: class {int(np.argmax(shares))} {shares.max():.1f} %\n"


def test_unsuitable_options_weights_and_images_are_named_by_predict(tmp_path, weights):
    PHOTO.crop((0, 0, 90, 60)).save(tmp_path / "a.png")
    assert "--top must be at least 1, not 0" in predict(weights, tmp_path / "a.png", "--top", 0)
    assert "--batch-size must be at least 1, not 0" in predict(weights, tmp_path / "a.png", "--batch-size", 0)
    assert "is a folder, not a weight file" in predict(tmp_path, tmp_path / "a.png")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    assert "cannot read" in predict(tmp_path / "cut.safetensors", tmp_path / "a.png")
    Image.new("RGB", (100_000, 1)).save(tmp_path / "thread.png")
    error = predict(weights, tmp_path / "thread.png")
    assert f"{tmp_path / 'thread.png'}: " in error
    assert "too elongated" in error


def test_out_of_range_summary_options_are_named():
    assert "image_size must be at least 1, not 0" in summary("--image-size", 0)
    assert "num_classes must be at least 1, not -1" in summary("--num-classes", -1)


def test_summary_states_the_image_size_and_number_of_classes():
    done = command("repvgg_jax.__main__", "summary", "repvgg-a0", "-r", 112, "--num-classes", 10)
    assert "one 112x112 image, 10 classes" in done.stdout


def test_a_warning_of_a_real_process_is_one_line_too(tmp_path):
    """For weights of an unpublished variant in a PyTorch file; the answer still goes to stdout."""
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8)), 2)
    rv.save_weights(tmp_path / "w.pth", model, random_variables(model))
    PHOTO.crop((0, 0, 90, 60)).save(tmp_path / "a.png")
    words = [sys.executable, "-m", "repvgg_jax", "predict", str(tmp_path / "w.pth"), str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: class ")
    assert done.stderr.startswith(f"warning: {tmp_path / 'w.pth'} is not a published variant")
    assert done.stderr.count("\n") == 1


def test_a_mistake_in_a_real_process_is_one_line():
    words = [sys.executable, "-m", "train.main", "--preset", "digits", "--batch-size", "6"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(4)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --batch-size 6 is not a multiple of 4 devices; 4 is\n"


@pytest.mark.parametrize(
    "module", ["repvgg_jax.__main__", "train.main", "train.evaluate", "train.plot", "convert.__main__"]
)
def test_every_command_prints_its_version(module):
    done = command(module, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"repvgg-jax {rv.__version__} (jax ")
    assert done.stdout.count("\n") == 1
