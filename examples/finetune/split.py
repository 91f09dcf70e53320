"""Training and validation split of a folder of photographs: `python -m examples.finetune.split PHOTOS OUT`.

`PHOTOS/CLASS/*`, at any depth, becomes `OUT/train/CLASS/*` and `OUT/val/CLASS/*`, the layout that `train.main --data`
expects.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.finetune.split")

import dataclasses
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro

from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.files import scratch_folder
from repvgg_jax.image_files import describe_left_out, image_files
from repvgg_jax.paths import local_path
from train.data.folders import TEST_FOLDERS
from train.data.sources import class_folders, no_images


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Split a folder of photographs, with one subfolder per class, into train/ and val/."""

    photos: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PHOTOS")]
    """Folder that contains CLASS/IMAGE. It is not modified."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to create. It will contain train/CLASS/IMAGE and val/CLASS/IMAGE."""
    val: float = 0.2
    """Fraction of each class to put in val/, between 0 and 1. Both val/ and train/ get at least one image."""
    seed: int = 0
    """Seed for the random choice."""


def chosen_for_val(names: list[str], share: float, seed: int) -> set[str]:
    """Return a random fraction `share` of the names: at least one, never all, and reproducible by the seed."""
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return set(random.Random(seed).sample(names, count))


def split(arguments: Arguments) -> str:
    """Create the split folder atomically, and return a one-line summary of its contents.

    Images are hard-linked, which takes no space, or copied if the file system does not support that.

    Raises:
      ConfigError: `val` is not between 0 and 1, `out` exists or is inside `photos`, or `photos` is already split.
      DataError: `photos` does not have one folder per class, a class has fewer than two images, or `out` cannot be
        created.
    """
    if not 0 < arguments.val < 1:
        raise ConfigError(f"--val must lie between 0 and 1, not {arguments.val}")
    photos, out = local_path("PHOTOS", arguments.photos), local_path("OUT", arguments.out)
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; remove it or choose another place for the split")
    if out.resolve().is_relative_to(photos.resolve()):
        raise ConfigError(
            f"{out} is inside {photos}, where it would be taken for one of the classes; choose another place"
        )
    classes = class_folders(photos)
    test_folders = [name for name in TEST_FOLDERS if name in classes]
    if "train" in classes and test_folders:
        raise ConfigError(
            f"{photos} contains train/ and {test_folders[0]}/: it is split already; pass it to --data without changes"
        )
    if classes == ["train"]:
        raise ConfigError(f"{photos} contains only train/: to split the images in it, pass {photos / 'train'}")
    listed = {name: image_files(photos / name) for name in classes}
    images = {name: [os.path.relpath(path, photos / name) for path in files.paths] for name, files in listed.items()}
    for name, files in images.items():
        if not files:
            raise no_images(photos / name)
        if len(files) < 2:
            raise DataError(f"{photos / name} holds one image; a class needs at least one to train and one to evaluate")
    counts = {"train": 0, "val": 0}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(".split-", out.parent) as scratch:
            half_made = scratch / "split"
            for name, files in images.items():
                val = chosen_for_val(files, arguments.val, arguments.seed)
                for side in counts:
                    (half_made / side / name).mkdir(parents=True)
                for file in files:
                    side = "val" if file in val else "train"
                    counts[side] += 1
                    target = half_made / side / name / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(photos / name / file, target)
            half_made.rename(out)
    except OSError as error:
        raise DataError(f"cannot create {out}: {error.strerror or error}") from error
    left_out = sum((files.left_out for files in listed.values()), Counter())
    others = f"; left out {describe_left_out(left_out)}" if left_out else ""
    return f"{out}: {len(images)} classes, {counts['train']} images to train on, {counts['val']} to evaluate on{others}"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m examples.finetune.split")
    print(split(arguments))
