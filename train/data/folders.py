"""A data set in a folder: `ROOT/train/CLASS/*` and `ROOT/val/CLASS/*`."""

from pathlib import Path

from repvgg_jax.errors import DataError, first_ten
from repvgg_jax.image_files import describe_left_out, image_files

from .sources import FolderSource, Source, UnopenedSource, class_folders, no_images

TEST_FOLDERS = ("val", "validation", "valid", "test")
"""Names of the evaluation split's folder; the first that exists is used."""


def open_folder(root: Path, evaluation_only: bool = False) -> tuple[Source, Source, tuple[str, ...]]:
    """Open both splits of a folder.

    Args:
      root: folder with `train/` and one of `TEST_FOLDERS`.
      evaluation_only: open no training split.

    Returns:
      The training split, the evaluation split, and messages for the user about them.

    Raises:
      DataError: a split is missing, a class has no images to train on or to evaluate on, or a folder cannot be listed.
    """
    present = [name for name in TEST_FOLDERS if (root / name).is_dir()]
    wanted = ["train"] * (not evaluation_only) + ["val"]
    missing = [name for name in wanted if not (present if name == "val" else (root / name).is_dir())]
    if missing:
        raise _missing(root, wanted, missing)
    notes = []
    if len(present) > 1:
        notes.append(f"{root}: evaluation on {present[0]}/, not on {', '.join(f'{name}/' for name in present[1:])}")
    test = FolderSource(root / present[0])
    if evaluation_only:
        train = UnopenedSource(0, test.class_names)
        listed, notes = [test], [*notes, *(f"no image of class {name} in {test.root}" for name in test.empty)]
    else:
        train = FolderSource(root / "train")
        _check_classes(train, test)
        listed = [train, test]
    notes += [f"{split.root}: left out {describe_left_out(split.left_out)}" for split in listed if split.left_out]
    return train, test, tuple(notes)


def _missing(root: Path, wanted: list[str], missing: list[str]) -> DataError:
    expected = " and ".join(str(root / name / "CLASS" / "IMAGE") for name in wanted)
    message = f"{root} holds no {' and no '.join(f'{name}/' for name in missing)}; expected {expected}"
    if missing == ["train", "val"] and _is_unsplit(root):
        message += f"; to split its class folders: python -m examples.finetune.split {root} OUT"
    if wanted == ["train", "val"] and missing == ["val"] and _is_unsplit(root / "train"):
        message += f"; to split train/ into both: python -m examples.finetune.split {root / 'train'} OUT"
    return DataError(message)


def _is_unsplit(root: Path) -> bool:
    """Return whether `root` holds class folders with images."""
    try:
        return any(image_files(root / name).paths for name in class_folders(root))
    except DataError:
        return False


def _check_classes(train: FolderSource, test: FolderSource) -> None:
    """Refuse classes without images to train on or to evaluate on, with advice that keeps both splits consistent.

    Raises:
      DataError: a class has no images to train on or to evaluate on.
    """
    for source, other in ((test, train), (train, test)):
        for name in source.empty:
            in_both = name in other.class_names
            raise no_images(source.root / name, f"both it and {other.root / name}" if in_both else "it")
    sides = ((train, test), (test, train))
    differences = [(one, other, sorted(set(one.class_names) - set(other.class_names))) for one, other in sides]
    texts = [f"only in {one.root.name}/: {first_ten(names)}" for one, _, names in differences if names]
    if texts:
        one, other, names = next(difference for difference in differences if difference[2])
        raise DataError(
            f"{train.root} and {test.root} hold different classes ({'; '.join(texts)}); every class needs images in "
            f"both: add some to {other.root / names[0]}, or remove {one.root / names[0]}"
        )
