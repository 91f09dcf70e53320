"""Claim: fine-tuning ends in a fused net of the new classes, and the example's training loop learns and fuses."""

import re

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from examples import use_in_your_code
from examples.finetune.split import Arguments, split
from repvgg_jax.preprocess import decode_image, eval_transform, normalize
from tests.helpers.commands import command
from tests.helpers.comparison import relative_difference
from tests.helpers.pages import run_page, write_dahlias_and_pagodas
from tests.helpers.random_weights import random_variables
from train.data.sources import FolderSource


@pytest.mark.slow
def test_fine_tuning_ends_in_a_fused_net_of_the_new_classes(sandbox):
    sandbox.trains = True
    run_page("examples/finetune/README.md", sandbox)

    run = sandbox.folder / "runs" / "photos"
    info = rv.inspect_weights(run / "deploy.safetensors")
    assert info.deploy
    assert info.class_names == ("dahlia", "pagoda")

    start = rv.load_weights("RepVGG-A0-train.pth")[1]["params"]["stage0"]
    tuned = rv.load_weights(run / "final.safetensors")[1]["params"]["stage0"]
    moved = relative_difference(start["rbr_dense"]["conv"]["kernel"], tuned["rbr_dense"]["conv"]["kernel"])
    assert 0 < moved < 0.5, "training starts from the file's weights and changes them"

    data = (sandbox.folder / "photos" / "dahlia" / "1.jpg").read_bytes()
    pixels = eval_transform(decode_image(data, "1.jpg"), info.preprocessing)
    images = normalize(pixels[None], info.preprocessing)
    trained, fused = (
        model.apply(variables, images)
        for model, variables in (rv.load_weights(run / f"{name}.safetensors") for name in ("final", "deploy"))
    )
    assert relative_difference(trained, fused) < 1e-5

    state = torch.load(run / "deploy.pth", weights_only=True)
    assert state["linear.weight"].shape[0] == 2
    assert "stage0.rbr_reparam.weight" in state


@pytest.fixture
def photos(tmp_path):
    """Ten photographs in each of two classes."""
    write_dahlias_and_pagodas(tmp_path / "photos", 10)
    return tmp_path / "photos"


def test_a_split_holds_every_photograph_once_and_every_class_on_both_sides(photos, tmp_path):
    out = tmp_path / "new" / "split"
    assert split(Arguments(str(photos), str(out), val=0.3)).endswith("14 images to train on, 6 to evaluate on")
    train, val = FolderSource(out / "train"), FolderSource(out / "val")
    assert train.class_names == val.class_names == ["dahlia", "pagoda"]

    def contents(source) -> list[bytes]:
        return [source[i].image for i in range(len(source))]

    assert sorted(contents(train) + contents(val)) == sorted(contents(FolderSource(photos)))
    assert [val[i].label for i in range(len(val))] == [0, 0, 0, 1, 1, 1]


def test_a_split_is_the_same_for_the_same_seed(photos, tmp_path):
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(Arguments(str(photos), str(tmp_path / name), seed=seed))
        chosen.append(sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name / "val").rglob("*.jpg")))
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_folder_that_cannot_be_split_is_one_line_and_leaves_no_files(photos, tmp_path):
    def said(*arguments: object) -> str:
        done = command("examples.finetune.split", *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    out = tmp_path / "out"
    assert "--val must lie between 0 and 1, not 1.0" in said(photos, out, "--val", 1)
    assert "cannot list the folder" in said(tmp_path / "none", out)
    assert f"{photos} exists" in said(photos, photos)
    (photos / "tulip").mkdir()
    assert "tulip holds no images" in said(photos, out)
    (photos / "tulip" / "1.jpg").write_bytes((photos / "dahlia" / "1.jpg").read_bytes())
    assert "tulip holds one image" in said(photos, out)
    (photos / "train").mkdir()
    (photos / "val").mkdir()
    for side in ("train", "val"):
        (photos / side / "1.jpg").write_bytes(b"")
    assert "it is split already" in said(photos, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_a_folder_that_is_already_split_or_contains_the_output_is_refused(photos, tmp_path):
    def said(*arguments: object) -> str:
        done = command("examples.finetune.split", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        return done.stderr

    for out in (photos / "out", photos / "dahlia" / "out"):
        assert f"{out} is inside {photos}, where it would be taken for one of the classes" in said(photos, out)
        assert not out.exists()
    (tmp_path / "link").symlink_to(photos)
    assert "is inside" in said(photos, tmp_path / "link" / "out")
    divided = tmp_path / "divided"
    split(Arguments(str(photos), str(divided)))
    assert "contains train/ and val/: it is split already; pass it to --data without changes" in said(
        divided, tmp_path / "a"
    )
    (divided / "val").rename(divided / "test")
    assert "contains train/ and test/: it is split already" in said(divided, tmp_path / "a")
    (divided / "test").rename(tmp_path / "elsewhere")
    assert f"contains only train/: to split the images in it, pass {divided / 'train'}" in said(divided, "a")


def test_folders_inside_class_folders_are_kept(photos, tmp_path):
    (photos / "dahlia" / "trip").mkdir()
    for number in range(1, 6):
        (photos / "dahlia" / f"{number}.jpg").rename(photos / "dahlia" / "trip" / f"{number}.jpg")
    (photos / "pagoda" / "notes.txt").write_text("x", encoding="utf-8")
    out = tmp_path / "split"
    assert split(Arguments(str(photos), str(out))).endswith("; left out 1 file that is not an image (1 .txt)")
    names = {str(path.relative_to(out / side)) for side in ("train", "val") for path in (out / side).rglob("*.jpg")}
    assert names == {str(path.relative_to(photos)) for path in photos.rglob("*.jpg")}


def test_even_a_small_class_has_an_image_on_either_side(photos, tmp_path):
    for path in sorted((photos / "dahlia").iterdir())[2:]:
        path.unlink()
    for share in (0.01, 0.99):
        out = tmp_path / f"{share}"
        split(Arguments(str(photos), str(out), val=share))
        assert len(list((out / "train" / "dahlia").iterdir())) == 1
        assert len(list((out / "val" / "dahlia").iterdir())) == 1


def check_custom_loop(*arguments: object) -> None:
    done = command("examples.use_in_your_code", *arguments)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < 0.6 < np.log(10)
    assert float(re.findall(r"forms: (\S+)", done.stdout)[0]) < 1e-5
    assert float(re.findall(r"(\S+) % of 360", done.stdout)[0]) > 80


def test_the_custom_loop_learns_and_fuses():
    check_custom_loop()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_custom_loop_refuses_the_deploy_form(suffix, tmp_path):
    model = rv.create_model(use_in_your_code.SMALL, num_classes=10)
    rv.save_weights(tmp_path / f"deploy{suffix}", *rv.to_deploy(model, random_variables(model)))
    done = command("examples.use_in_your_code", tmp_path / f"deploy{suffix}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("is in deploy form, which cannot be trained; give the training form")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::repvgg_jax.weights.WeightsWarning")
def test_the_custom_loop_starts_from_a_file_of_other_classes(tmp_path):
    model = rv.create_model(use_in_your_code.SMALL, num_classes=4)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    check_custom_loop(tmp_path / "w.safetensors")
