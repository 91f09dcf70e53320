"""Claim: a classifier's outputs and a data set's classes are matched by name, and never by accident."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.net.variants import Variant
from repvgg_jax.trees import flatten
from tests.helpers.commands import command
from tests.helpers.photos import write_photos
from tests.helpers.random_weights import random_variables
from train.class_names import class_order
from train.presets import parse
from train.run import fresh_state, set_up

SMALL = Variant((1, 1, 2, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)
PLUS = Variant(
    (1, 1, 2, 1), (4, 4, 4, 8, 8), name="SmallPlus", image_size=32, squeeze_excite="after_relu", auxiliary_heads=True
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photographs of three classes: garden, pagoda, wall."""
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 10, offset=20)
    for side in ("train", "val"):
        folder = tmp_path / "photos" / side
        (folder / "wall").mkdir()
        for name in ("000.jpg", "002.jpg"):
            (folder / "garden" / name).rename(folder / "wall" / name)
    return tmp_path / "photos"


def write_weights(path: Path, names: tuple[str, ...] | None, variant: Variant = SMALL) -> Path:
    model = rv.create_model(variant, 3)
    rv.save_weights(path, model, random_variables(model), class_names=names)
    return path


def rename(photos: Path, old: str, new: str) -> None:
    for side in ("train", "val"):
        (photos / side / old).rename(photos / side / new)


# Evaluation


def evaluate(photos: Path, form: str, weights: Path, *options: str) -> tuple[dict[str, float], str]:
    done = command("train.evaluate", photos, form, weights, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_the_same_classes_in_another_order_give_the_same_accuracy(photos: Path, tmp_path: Path, form: str) -> None:
    """The file's names are in a trainer's order, which is not that of the folders."""
    weights = write_weights(tmp_path / "w.safetensors", ("garden", "pagoda", "wall"))
    plain, stderr = evaluate(photos, form, weights)
    assert stderr == ""
    assert 0 < plain["top1"] < 1, "the accuracy depends on the order"
    model, variables = rv.load_weights(weights)
    order = np.array([2, 0, 1])
    variables["params"]["linear"] = {k: v[..., order] for k, v in variables["params"]["linear"].items()}
    turned = tmp_path / "turned.safetensors"
    rv.save_weights(turned, model, variables, class_names=("wall", "garden", "pagoda"))
    reordered, stderr = evaluate(photos, form, turned)
    assert reordered == plain
    assert stderr == f"{photos} has the classes of {turned} in another order: matched by name\n"


def test_other_classes_are_refused_in_one_line_unless_told_to_ignore_names(photos: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "w.safetensors", ("garden", "pagoda", "wall"))
    plain, _ = evaluate(photos, "train", weights)
    rename(photos, "garden", "zen garden")  # now sorted last
    done = command("train.evaluate", photos, "train", weights)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {weights} and {photos} name different classes (only in the file: garden; only in the data: "
        "zen garden); --ignore-class-names evaluates by index all the same\n"
    )
    by_index, stderr = evaluate(photos, "train", weights, "--ignore-class-names")
    assert "evaluated by index" in stderr
    assert by_index["images"] == plain["images"]


def test_a_file_without_names_is_evaluated_as_before(photos: Path, tmp_path: Path) -> None:
    named, _ = evaluate(photos, "train", write_weights(tmp_path / "a.safetensors", ("garden", "pagoda", "wall")))
    without, stderr = evaluate(photos, "train", write_weights(tmp_path / "b.safetensors", None))
    assert (without, stderr) == (named, "")


# The order itself


def test_names_are_matched_in_any_unicode_normalisation() -> None:
    names = ["café", "naïve", "plain"]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]
    assert decomposed != names
    assert class_order(names, decomposed) == [0, 1, 2]
    assert class_order(names[::-1], decomposed) == [2, 1, 0]


@pytest.mark.parametrize(
    ("of_file", "of_data"), [(["a", "b"], ["a", "c"]), (["a", "a"], ["a", "b"]), (["a", "b"], ["a", "a"]), (["a"], [])]
)
def test_other_or_repeated_names_have_no_order(of_file: list[str], of_data: list[str]) -> None:
    assert class_order(of_file, of_data) is None


def test_identical_names_match_even_if_one_occurs_twice() -> None:
    assert class_order(["crane", "owl", "crane"], ["crane", "owl", "crane"]) == [0, 1, 2]  # as in ImageNet
    assert class_order(["crane", "owl", "crane"], ["owl", "crane", "crane"]) is None


# Fine-tuning: --init


def started(photos: Path, weights: Path, *options: str) -> dict[str, np.ndarray]:
    """Return the initial parameters of a run."""
    words = ["--preset", "imagenet_120", "--data", str(photos), "--batch-size", "4", "--init", str(weights)]
    words += ["--model", str(weights), "--image-size", "32", "--workdir", str(photos.parent / "run")]
    state = fresh_state(set_up(parse([*words, *options])))
    return {name: np.asarray(leaf) for name, leaf in flatten(state.variables).items()}


def heads(leaves: dict[str, np.ndarray]) -> list[str]:
    return [name for name in leaves if "linear/" in name]


@pytest.mark.parametrize("variant", [SMALL, PLUS], ids=lambda variant: variant.name)
def test_fine_tuning_rearranges_the_classifier_by_name(
    photos: Path, tmp_path: Path, variant: Variant, capsys: pytest.CaptureFixture
) -> None:
    weights = write_weights(tmp_path / "w.safetensors", ("wall", "garden", "pagoda"), variant)
    original, initial = flatten(rv.load_weights(weights)[1]), started(photos, weights)
    assert len(heads(initial)) == (8 if variant.auxiliary_heads else 2)
    for name, leaf in initial.items():
        expected = np.asarray(original[name])
        if name in heads(initial):
            expected = np.stack([expected[..., 1], expected[..., 2], expected[..., 0]], -1)
        assert np.array_equal(leaf, expected), name
    assert "its classifier is reordered by name" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [SMALL, PLUS], ids=lambda variant: variant.name)
def test_as_many_other_classes_give_a_new_classifier_and_a_warning(
    photos: Path, tmp_path: Path, variant: Variant, capsys: pytest.CaptureFixture
) -> None:
    weights = write_weights(tmp_path / "w.safetensors", ("cat", "dog", "wall"), variant)
    original, initial = flatten(rv.load_weights(weights)[1]), started(photos, weights)
    stderr = capsys.readouterr().err
    assert (
        "(only in the file: cat, dog; only in the data: garden, pagoda): the classifier is newly initialised" in stderr
    )
    for name, leaf in initial.items():
        assert np.array_equal(leaf, original[name]) == (name not in heads(initial)), name
    bound = 8**-0.5  # of PyTorch's default initialisation, for 8 features
    assert 0 < np.abs(initial["params/linear/kernel"]).max() <= bound

    kept = started(photos, weights, "--keep-classifier")
    assert "its classifier is kept, by index" in capsys.readouterr().err
    for name, leaf in kept.items():
        assert np.array_equal(leaf, original[name]), name


@pytest.mark.parametrize("names", [None, ("garden", "pagoda", "wall")])
def test_the_same_or_unknown_classes_keep_the_classifier_silently(
    photos: Path, tmp_path: Path, names: tuple[str, ...] | None, capsys: pytest.CaptureFixture
) -> None:
    weights = write_weights(tmp_path / "w.safetensors", names)
    original, initial = flatten(rv.load_weights(weights)[1]), started(photos, weights)
    assert all(np.array_equal(leaf, original[name]) for name, leaf in initial.items())
    assert capsys.readouterr().err == ""


def test_a_classifier_of_another_size_cannot_be_kept(photos: Path, tmp_path: Path) -> None:
    model = rv.create_model(SMALL, 5)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    with pytest.raises(rv.RepVGGError, match=r"--keep-classifier: .* has 5 classes, the data 3"):
        started(photos, tmp_path / "w.safetensors", "--keep-classifier")
