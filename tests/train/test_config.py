"""Claim: a run continues only with the options it was started with, whichever version wrote them."""

import dataclasses
import json

import pytest

import repvgg_jax as rv
from tests.helpers.architecture import write_variant
from train.config_file import save_or_compare
from train.presets import parse
from train.recipe import Recipe, RunOptions


@pytest.fixture
def workdir(tmp_path):
    """A folder whose run has reached its first checkpoint, and its options."""
    config = Recipe(run=RunOptions(workdir=str(tmp_path)))
    save_or_compare(config, tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path, config


def without(tree, group, name):
    return tree | {group: {key: value for key, value in tree[group].items() if key != name}}


def test_a_run_older_than_an_option_has_its_default(workdir):
    path, config = workdir
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(without(saved, "model", "dropout")), encoding="utf-8")
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    with pytest.raises(rv.RepVGGError, match=r"other options \(dropout 0.0 -> 0.2\)"):
        save_or_compare(changed, path)
    save_or_compare(config, path)
    assert json.loads((path / "config.json").read_text(encoding="utf-8")) == saved


def test_a_changed_option_is_refused_if_it_affects_weights(workdir):
    path, config = workdir
    optimizer = dataclasses.replace(config.optimizer, batch_size=32)
    with pytest.raises(rv.RepVGGError, match=r"other options \(batch_size 256 -> 32\)"):
        save_or_compare(dataclasses.replace(config, optimizer=optimizer), path)
    save_or_compare(dataclasses.replace(config, run=dataclasses.replace(config.run, keep_checkpoints=9)), path)


OF_AN_EARLIER_VERSION = """
{"model": {"model": "RepVGG-B0", "dtype": "float32", "remat": false, "block": "qarepvgg", "dense_copies": 2,
  "dbb_1x1_3x3": false, "dbb_1x1_avg": false, "activation": "relu", "stem_stride": 1, "epsilon": null, "dropout": 0.0,
  "quantization": "none"},
 "input": {"data": "photos", "data_dir": null, "train_split": null, "test_split": null, "image_size": 224,
  "test_image_size": null, "crop_fraction": null, "workers": null, "strict": false, "prefetch": 2},
 "augment": {"crop_area": [0.08, 1.0], "horizontal_flip": 0.5, "auto_augment": "none", "randaugment_ops": 2,
  "randaugment_magnitude": 9, "jitter_brightness": 0.0, "jitter_contrast": 0.0, "jitter_saturation": 0.0,
  "jitter_hue": 0.0, "random_erasing": 0.0, "exact_crop": false},
 "optimizer": {"epochs": 120, "batch_size": 256, "accumulate": 1, "learning_rate": 0.1, "momentum": 0.9,
  "nesterov": false, "weight_decay": 0.0001, "warmup_epochs": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0,
  "auxiliary_weight": 0.1, "clip_norm": 0.0, "ema_decay": 0.0},
 "fine_tune": {"init": null, "keep_classifier": false, "freeze_stages": 0, "freeze_bn": false,
  "head_learning_rate": 1.0},
 "run": {"workdir": "runs/imagenet_120-RepVGG-B0", "seed": 0, "log_every": 50, "evaluate_every": 1,
  "checkpoint_every": 1000, "keep_checkpoints": 2, "profile": false},
 "cluster": {"coordinator_address": null, "num_processes": null, "process_id": null}}
"""
"""Written for `PHOTOS_RUN` by a version in which nets could not come from files and data sets had no sizes."""

PHOTOS_RUN = ["--preset", "imagenet_120", "--data", "photos", "--model", "RepVGG-B0"]
PHOTOS_RUN += ["--block", "qarepvgg", "--stem-stride", "1", "--dense-copies", "2"]


@pytest.fixture
def old_run(tmp_path):
    """The folder of a run that an earlier version started."""
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "config.json").write_text(OF_AN_EARLIER_VERSION, encoding="utf-8")
    return tmp_path


def test_a_run_started_by_an_earlier_version_continues(old_run):
    for _ in range(2):  # the second time, with what this version has written
        save_or_compare(parse(PHOTOS_RUN), old_run)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "RepVGG-A0"], "model RepVGG-B0 -> RepVGG-A0"),
        (["--stem-stride", "2"], r"strides \(1, 2, 2, 2, 2\) -> \(2, 2, 2, 2, 2\)"),
        (["--dense-copies", "3", "--image-size", "160"], "dense_copies 2 -> 3; image_size 224 -> 160"),
        (["--widths", "8", "8", "8", "16", "16"], r"widths \(64, 64, 128, 256, 1280\) -> \(8, 8, 8, 16, 16\)"),
        (["--image-size", "160"], "image_size 224 -> 160"),
        (["--mean", "0.5", "0.5", "0.5"], r"mean None -> \[0.5, 0.5, 0.5\]"),
    ],
)
def test_such_a_run_must_keep_its_net_and_its_images(options, says, old_run):
    for _ in range(2):
        with pytest.raises(rv.RepVGGError, match=rf"other options \({says}\)"):
            save_or_compare(parse([*PHOTOS_RUN, *options]), old_run)
        save_or_compare(parse(PHOTOS_RUN), old_run)


def test_the_same_net_may_be_named_differently_and_another_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    small = rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), name="small")
    net = write_variant(tmp_path, small)
    run = ["--preset", "digits", "--workdir", str(tmp_path)]
    save_or_compare(parse([*run, "--model", str(net)]), tmp_path)
    numbers = ["--num-blocks", "1", "1", "2", "1", "--widths", "8", "8", "8", "16", "16"]
    save_or_compare(parse([*run, *numbers]), tmp_path)
    save_or_compare(parse([*run, "--model", str(net)]), tmp_path)
    write_variant(tmp_path, dataclasses.replace(small, activation="gelu"))
    with pytest.raises(rv.RepVGGError, match=r"other options \(activation relu -> gelu\)"):
        save_or_compare(parse([*run, "--model", str(net)]), tmp_path)
