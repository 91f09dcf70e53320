"""Claim: anything missing in a data folder or skipped is reported once, and the advice in the message works."""

import re
import shutil
from pathlib import Path

import pytest

import repvgg_jax as rv
from repvgg_jax.errors import DataError
from repvgg_jax.net.variants import Variant
from tests.helpers.batches import training
from tests.helpers.commands import command
from tests.helpers.photos import PHOTO, encode, write_photos
from tests.helpers.random_weights import random_variables
from train.data import open_dataset
from train.data.sources import FolderSource

SMALL = Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, garden and pagoda."""
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 6, offset=20)
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = rv.create_model(SMALL, 2)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model), class_names=("garden", "pagoda"))
    return tmp_path / "w.safetensors"


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("side", ["val", "train"])
@pytest.mark.parametrize("with_folder", [True, False])
@pytest.mark.parametrize("advice", ["add", "remove"])
def test_either_advice_on_a_class_without_images_works(photos: Path, side: str, with_folder: bool, advice: str) -> None:
    """After doing what the message says, the same command works."""
    folder, other = (photos / name / "pagoda" for name in (side, "val" if side == "train" else "train"))
    empty(folder)
    if not with_folder:
        folder.rmdir()
    with pytest.raises(DataError) as caught:
        open_dataset(str(photos))
    message = str(caught.value)
    assert "\n" not in message
    if with_folder:
        match = re.search(r"class folder (\S+) holds no images; add some .* or remove both it and (\S+)$", message)
        assert match is not None, message
        add_to, remove = match[1], [match[1], match[2]]
    else:
        match = re.search(r"only in (?:train|val)/: pagoda\).* add some to (\S+), or remove (\S+)$", message)
        assert match is not None, message
        add_to, remove = match[1], [match[2]]
    assert add_to == str(folder)
    assert remove[-1] == str(other)
    if advice == "add":
        folder.mkdir(exist_ok=True)
        (folder / "new.jpg").write_bytes(encode(PHOTO, "JPEG"))
    else:
        for path in remove:
            shutil.rmtree(path)
    assert open_dataset(str(photos)).num_classes == (2 if advice == "add" else 1)


def test_evaluation_alone_accepts_an_empty_class_folder(photos: Path, weights: Path) -> None:
    """Its class is one of the net's, and removing the folder would renumber the classes."""
    empty(photos / "val" / "garden")
    done = command("train.evaluate", photos, "train", weights)
    assert done.returncode == 0, done.stderr
    assert '"images": 3' in done.stdout
    assert done.stderr == f"no image of class garden in {photos / 'val'}\n"
    empty(photos / "val" / "pagoda")
    done = command("train.evaluate", photos, "train", weights)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds no images; add some" in done.stderr


def test_files_that_are_not_images_are_counted_once(photos: Path, weights: Path) -> None:
    for name in ("train/garden/notes.txt", "val/garden/more/a.csv", "val/pagoda/b.csv", "val/pagoda/IMG_1.HEIC"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text("x", encoding="utf-8")
    assert open_dataset(str(photos)).notes == (
        f"{photos / 'train'}: left out 1 file that is not an image (1 .txt)",
        f"{photos / 'val'}: left out 3 files that are not images (2 .csv, 1 .heic)",
    )
    done = command("train.evaluate", photos, "train", weights)
    assert done.stderr == f"{photos / 'val'}: left out 3 files that are not images (2 .csv, 1 .heic)\n"


@pytest.mark.slow
def test_an_unreadable_validation_image_is_named_only_once(photos: Path, weights: Path) -> None:
    """Met in two evaluations while training, and in four forms at the end."""
    broken = photos / "val" / "garden" / "broken.jpg"
    broken.write_bytes(b"xx")
    options = ("--preset", "imagenet_120", "--model", weights, "--data", photos, "--image-size", 32, "--epochs", 2)
    done = command("train.main", *options, "--batch-size", 8, "--ema-decay", 0.9, "--workdir", photos.parent / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        f"warning: skipped an unreadable image: {broken}: cannot be read as an image (no known image format)\n"
    )
    assert "1 image could not be read and was skipped" in done.stdout
    done = command("train.evaluate", photos, "train", weights)
    assert done.stderr == (
        f"warning: skipped an unreadable image: {broken}: cannot be read as an image (no known image format)\n"
        "1 image could not be read and was skipped\n"
    )


# Folders with other names, and folders that are not split yet


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_the_evaluation_split_may_have_other_names(photos: Path, weights: Path, name: str) -> None:
    (photos / "val").rename(photos / name)
    dataset = open_dataset(str(photos))
    assert (len(dataset.train), len(dataset.test), dataset.notes) == (8, 6, ())
    assert dataset.test[0].name.startswith(str(photos / name))
    shutil.rmtree(photos / name / "garden")
    with pytest.raises(DataError, match=rf"only in train/: garden\); .* add some to \S+/{name}/garden, or remove"):
        open_dataset(str(photos))


def test_of_several_evaluation_splits_the_first_is_used_and_named(photos: Path) -> None:
    for name in ("valid", "test"):
        write_photos(photos / name, 4)
    assert open_dataset(str(photos)).notes == (f"{photos}: evaluation on val/, not on valid/, test/",)
    shutil.rmtree(photos / "val")
    dataset = open_dataset(str(photos), evaluation_only=True)
    assert dataset.notes == (f"{photos}: evaluation on valid/, not on test/",)
    assert len(dataset.test) == 4


def test_an_unsplit_folder_gets_the_command_that_splits_it(photos: Path, tmp_path: Path) -> None:
    (photos / "train").rename(tmp_path / "unsplit")
    command_line = f"; to split its class folders: python -m examples.finetune.split {tmp_path / 'unsplit'} OUT"
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / "unsplit"))
    assert str(caught.value).endswith(command_line)
    module, *arguments = command_line.partition("python -m ")[2].split()
    done = command(module, *arguments[:-1], tmp_path / "divided")
    assert done.returncode == 0, done.stderr
    assert len(open_dataset(str(tmp_path / "divided")).train) == 6
    (tmp_path / "nothing" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"nothing holds no train/ and no val/; expected \S+ and \S+$"):
        open_dataset(str(tmp_path / "nothing"))


@pytest.mark.parametrize("spec", ["gs://bucket/photos", "s3://bucket/photos"])
def test_a_url_is_one_line(spec: str, weights: Path) -> None:
    done = command("train.evaluate", spec, "train", weights)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{spec}: only local files and folders can be used" in done.stderr


def test_images_replaced_or_removed_during_training_are_read_or_skipped(photos: Path) -> None:
    source = FolderSource(photos / "train")
    (before,) = training(source, 1)
    paths = [Path(source[index].name) for index in range(len(source))]
    paths[0].write_bytes(encode(PHOTO.resize((300, 20)), "PNG"))
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    paths[2].unlink()
    paths[3].write_bytes(b"")
    (after,) = training(source, 1, start_step=0)
    assert after["image"].shape == before["image"].shape
    with pytest.raises(DataError, match=r"(cannot be read|the file is empty)"):
        training(source, 1, strict=True)
