"""Claim: one run writes to a workdir at a time, a resumed one may log differently, a failed start leaves nothing."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import repvgg_jax as rv
from tests.helpers.commands import command
from tests.helpers.photos import write_photos
from tests.helpers.repository import ROOT
from train.checkpoint import RunFacts
from train.config_file import save_or_compare
from train.data.fingerprint import data_fingerprint
from train.data.sources import FolderSource
from train.presets import PRESETS, parse
from train.recipe import InputOptions, Recipe, RunOptions
from train.run import check_augmentation, make_evaluator, set_up
from train.workdir import LOCK, claimed

HOLDER = textwrap.dedent(
    """
    import dataclasses, pathlib, sys
    from train.recipe import Recipe
    from train.workdir import claimed
    with claimed(Recipe(), pathlib.Path(sys.argv[1])):
        print("claimed", flush=True)
        sys.stdin.read()
    """
)


@pytest.fixture
def hold():
    """Starts processes that hold a workdir until their stdin is closed, and ends them afterwards."""
    started = []

    def start(workdir: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(workdir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_until_the_first_ends_or_is_killed(hold, tmp_path):
    workdir = tmp_path / "run [1]"
    process = hold(workdir)
    before = {path.name: path.read_bytes() for path in workdir.iterdir()}
    with (
        pytest.raises(rv.ConfigError, match=rf"in use by process {process.pid} on \S+: wait for it"),
        claimed(PRESETS["plus_300"], workdir),
    ):
        pass
    assert {path.name: path.read_bytes() for path in workdir.iterdir()} == before
    process.kill()
    process.wait()
    assert (workdir / LOCK).read_bytes(), "the holder's name remains, the lock does not"
    for _ in range(2):
        with claimed(Recipe(), workdir):
            assert str(os.getpid()).encode() in (workdir / LOCK).read_bytes()
        assert (workdir / LOCK).read_bytes() == b""


def test_the_command_refuses_it_in_one_line(tmp_path):
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4)
    options = ("--data", tmp_path / "photos", "--batch-size", 4, "--workdir", tmp_path / "run", "--image-size", 32)
    with claimed(Recipe(), tmp_path / "run"):
        done = command("train.main", "--preset", "digits", *options)
    assert done.returncode == 2
    assert f"in use by process {os.getpid()} on " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def begun(tmp_path) -> tuple[Path, Recipe]:
    """A folder whose run has reached its first checkpoint, and its options."""
    config = Recipe(input=InputOptions(data="/here/photos"), run=RunOptions(workdir=str(tmp_path / "run")))
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    save_or_compare(config, tmp_path / "run")
    return tmp_path / "run", config


def changed(config: Recipe, group: str, **values: object) -> Recipe:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("run", {"log_every": 1}),
        ("run", {"evaluate_every": 7}),
        ("run", {"checkpoint_every": 3}),
        ("input", {"strict": True}),
        ("input", {"data": "/moved/photos"}),
    ],
)
def test_options_that_do_not_affect_weights_may_change(group, values, begun):
    workdir, config = begun
    save_or_compare(changed(config, group, **values), workdir)


def test_for_more_epochs_the_message_says_what_to_do(begun):
    workdir, config = begun
    with pytest.raises(rv.ConfigError, match=r"epochs 120 -> 200.*choose another --workdir, .* --init \S+/final"):
        save_or_compare(changed(config, "optimizer", epochs=200), workdir)
    with pytest.raises(rv.ConfigError, match=r"seed 0 -> 1\); choose another --workdir$"):
        save_or_compare(changed(config, "run", seed=1), workdir)


def test_a_moved_data_folder_is_recognised_by_its_images(tmp_path):
    write_photos(tmp_path / "a", 8)
    before = FolderSource(tmp_path / "a")
    fingerprint = data_fingerprint(before)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = FolderSource(tmp_path / "b")
    assert data_fingerprint(moved) == fingerprint
    write_photos(tmp_path / "c", 8, offset=30)
    assert data_fingerprint(FolderSource(tmp_path / "c")) != fingerprint
    first = sorted((tmp_path / "b").iterdir())[0]
    first.rename(first.with_name("zzz"))
    assert data_fingerprint(FolderSource(tmp_path / "b")) != fingerprint, "a different class order is different data"


def test_checkpoints_of_earlier_versions_do_not_record_the_images():
    old = RunFacts(seed=0, batch_size=4, train_images=8, devices=1)
    assert (old.classes, old.images) == ("", "")


URLS = ["https://host/x", "abfss://c@a/x"]


@pytest.mark.parametrize(
    ("option", "url"),
    [
        *((option, url) for option in ("--workdir", "--data", "--data-dir", "--init") for url in URLS),
        *(("--data", url) for url in ("gs://bucket/run", "s3://bucket/a")),
    ],
)
def test_urls_are_refused_in_one_line(url, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rv.ConfigError, match=rf"^{option} {url}: only local files and folders"):
        parse(["--preset", "digits", option, url])
    assert not list(tmp_path.iterdir())


def test_a_hub_address_is_kept_as_it_is():
    address = "hf://timm/repvgg_a0.rvgg_in1k"
    assert parse(["--preset", "imagenet_120", "--init", address]).fine_tune.init == address


def test_a_tilde_that_the_shell_did_not_expand_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4)
    arguments = ["--preset", "digits", "--data=~/photos", "--workdir=~/run", "--batch-size", "4"]
    run = set_up(parse(arguments))
    assert run.workdir == tmp_path / "run"
    assert len(run.dataset.train) == 8
    assert set_up(parse([*arguments[:-2], "--data=digits", "--data-dir=~/tfds"])).dataset.name == "digits"
    assert (tmp_path / "tfds").is_dir()
    assert not (tmp_path / "~").exists()
    with pytest.raises(rv.ConfigError, match="--workdir ~nobody-here/x: there is no such user"):
        parse(["--preset", "digits", "--workdir", "~nobody-here/x"])


def test_a_failed_start_leaves_no_workdir(tmp_path):
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for wrong in (
        ("--init", tmp_path / "none.pth"),
        ("--init", tmp_path / "weights.pth"),
        ("--batch-size", 12),
        ("--data", tmp_path),
    ):
        options = ("--data", tmp_path / "photos", "--batch-size", 4, "--workdir", tmp_path / "run", *wrong)
        done = command("train.main", "--preset", "digits", *options)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "run").exists(), wrong


@pytest.mark.parametrize(("accumulate", "expected"), [(1, 8), (2, 4)])
def test_evaluation_uses_portions_no_larger_than_trainings(accumulate, expected, tmp_path, monkeypatch):
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4)
    seen = []
    monkeypatch.setattr("train.run.Evaluator", lambda *_, batch_size, **__: seen.append(batch_size))
    options = ["--data", str(tmp_path / "photos"), "--batch-size", "8", "--accumulate", str(accumulate)]
    run = set_up(parse(["--preset", "imagenet_120", *options]))
    make_evaluator(run, run.model)
    assert seen == [expected]


def test_the_preset_must_be_named():
    presets = "digits, cifar10, imagenet_120, imagenet_200, plus_300"
    with pytest.raises(rv.ConfigError, match=f"--preset is missing.*{presets}"):
        parse(["--data", "/data/imagenet"])
    done = command("train.main", "--help")
    assert done.returncode == 0
    assert "--preset" in done.stdout


@pytest.mark.parametrize("wrong", [("--crop-area", "0.3", "1"), ("--horizontal-flip", "0")])
def test_options_for_photographs_are_refused_for_other_data(wrong, tmp_path):
    config = parse(["--preset", "digits", "--data-dir", str(tmp_path / "tfds"), *wrong])
    with pytest.raises(rv.ConfigError, match=f"{wrong[0]} is for photographs, and the data set digits has none"):
        set_up(config)
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4)
    run = set_up(parse(["--preset", "digits", "--data", str(tmp_path / "photos"), "--batch-size", "4", *wrong]))
    check_augmentation(run.recipe.augment, run.dataset)


@pytest.mark.parametrize(
    ("preset", "epochs", "warmup"),
    [("digits", 1, 0.0667), ("digits", 2, 0.1333), ("digits", 3, 2), ("plus_300", 4, 0.0667)],
)
def test_a_presets_warm_up_is_shortened_if_it_does_not_fit(preset, epochs, warmup, capsys):
    config = parse(["--preset", preset, "--epochs", str(epochs)])
    assert config.optimizer.warmup_epochs == pytest.approx(warmup)
    stderr = capsys.readouterr().err
    assert ("shortened to" in stderr) == (warmup < 1)
    assert stderr.count("\n") == (warmup < 1)


@pytest.mark.parametrize("spelled", ["--warmup-epochs", "--warmup_epochs"])
def test_an_explicit_warm_up_that_does_not_fit_is_an_error(spelled):
    with pytest.raises(rv.ConfigError, match="--warmup-epochs must be less than --epochs, 1, not 2"):
        parse(["--preset", "digits", "--epochs", "1", spelled, "2"])
