"""Claim: any architecture trains from the command line: given as numbers, as a JSON file or as a weight file."""

import dataclasses
import json
from pathlib import Path

import pytest

import repvgg_jax as rv
from tests.helpers.architecture import write_variant
from tests.helpers.commands import command
from tests.helpers.photos import write_photos
from tests.helpers.random_weights import random_variables
from train.presets import parse

SMALL = rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), groups=2, activation="gelu", name="small", image_size=32)
NUMBERS = ("--num-blocks", "1", "1", "2", "1", "--widths", "8", "8", "8", "16", "16")


def variant_of(*options: object) -> rv.Variant:
    return parse(["--preset", "digits", *map(str, options)]).model.variant


def test_numbers_change_the_model_and_remove_its_name() -> None:
    variant = variant_of(*NUMBERS)
    assert variant == rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 16))
    narrow = variant_of("--model", "RepVGG-B1g2", "--widths", 8, 8, 8, 16, 16)
    assert narrow == rv.Variant((4, 6, 16, 1), variant.widths, groups=2)
    assert narrow.published.top1 is None


def test_a_json_file_holds_fields_or_a_weight_files_header(tmp_path: Path) -> None:
    assert variant_of("--model", write_variant(tmp_path, SMALL)) == SMALL
    (tmp_path / "net.json").write_text('{"num_blocks": [1, 1, 2, 1], "widths": [8, 8, 8, 16, 16]}', encoding="utf-8")
    assert variant_of("--model", tmp_path / "net.json") == rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), name="net")
    header = {"version": 1, "variant": "RepVGG-A1", "form": "deploy"}
    (tmp_path / "header.json").write_text(json.dumps(header), encoding="utf-8")
    assert variant_of("--model", tmp_path / "header.json") == rv.create_model("RepVGG-A1").variant


def test_a_weight_file_sets_the_architecture_and_options_change_it(tmp_path: Path) -> None:
    model = rv.create_model(SMALL, 7)
    rv.save_weights(tmp_path / "w.safetensors", *rv.to_deploy(model, random_variables(model)))
    assert variant_of("--model", tmp_path / "w.safetensors") == SMALL
    changed = variant_of("--model", tmp_path / "w.safetensors", "--activation", "relu", "--strides", 1, 1, 2, 2, 2)
    assert changed == dataclasses.replace(SMALL, activation="relu", strides=(1, 1, 2, 2, 2))
    assert variant_of("--strides", 1, 1, 2, 2, 2, "--stem-stride", 2).strides == (2, 1, 2, 2, 2)
    branches = dataclasses.replace(SMALL, branches=rv.Branches(strips=True, identity=False))
    changed_branches = variant_of("--model", write_variant(tmp_path, branches), "--dense-copies", 3).branches
    assert changed_branches == rv.Branches(dense_copies=3, strips=True, identity=False)


def test_the_folder_of_a_run_is_named_after_its_net(tmp_path: Path) -> None:
    net = write_variant(tmp_path, SMALL)
    names = {("--model", str(net)): "small", NUMBERS: "custom", ("--model", "RepVGG-A1"): "RepVGG-A1"}
    for options, name in names.items():
        assert parse(["--preset", "digits", *options]).run.workdir == f"runs/digits-{name}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "does not describe a network: "),
        ("[1, 2]", "does not describe a network: "),
        ("{}", "does not describe a network: there is no field 'num_blocks'"),
        ('{"num_blocks": [1, 1, 2, 1]}', "does not describe a network: .*'widths'"),
        ('{"num_blocks": [1, 1, 2], "widths": [8, 8, 8, 16, 16]}', "num_blocks must be four positive numbers"),
        ('{"num_blocks": [1, 1, 999999, 1], "widths": [8, 8, 8, 16, 16]}', "more than 9999 blocks"),
        ('{"num_blocks": [1, 1, 2, 1], "widths": [8, 8, 8, 16, 16], "depth": 3}', "does not know: depth"),
        ('{"variant": "RepVGG-A9"}', "unknown model 'RepVGG-A9'; did you mean"),
    ],
)
def test_a_json_file_that_does_not_describe_a_net_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "net.json").write_text(text, encoding="utf-8")
    with pytest.raises(rv.RepVGGError, match=says) as caught:
        variant_of("--model", tmp_path / "net.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--num-blocks", 1, 2, 3), "--num-blocks must be 4 numbers, not 1 2 3"),
        (("--num-blocks", 1, 2, 3, 0), "--num-blocks must lie between 1 and 999, not 1 2 3 0"),
        (("--widths", 8, 8), "--widths must be 5 numbers, not 8 8"),
        (("--strides", 1, 2, 3, 2, 2), "--strides must lie between 1 and 2, not 1 2 3 2 2"),
        (
            ("--model", "RepVGG-B1g4", "--widths", 6, 6, 6, 6, 6),
            "--model RepVGG-B1g4 cannot have these options: stage",
        ),
        (("--model", "none.json"), "--model none.json: No such file or directory"),
        (("--model", "none.safetensors"), "none.safetensors does not exist"),
    ],
)
def test_numbers_that_do_not_describe_a_net_are_one_line(options: tuple[object, ...], says: str) -> None:
    with pytest.raises(rv.RepVGGError, match=says) as caught:
        variant_of(*options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_custom_net_is_trained_and_evaluated(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4, offset=20)
    net = write_variant(tmp_path, SMALL)
    options = ("--data", tmp_path / "photos", "--workdir", tmp_path / "run", "--batch-size", 8, "--epochs", 1)
    colours = ("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.3, "--crop-fraction", 0.9)
    done = command("train.main", "--preset", "imagenet_120", "--model", net, "--image-size", 32, *options, *colours)
    assert done.returncode == 0, done.stderr
    for name in ("final", "deploy"):
        info = rv.inspect_weights(tmp_path / "run" / f"{name}.safetensors")
        assert info.variant == SMALL
        assert info.preprocessing == rv.Preprocessing(32, 0.9, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    top1 = json.loads(done.stdout.splitlines()[-1])["test_top1_deploy_form"]
    evaluate = ("train.evaluate", tmp_path / "photos", "deploy", tmp_path / "run" / "final.safetensors", "-a")
    assert json.loads(command(*evaluate, net).stdout)["top1"] == top1
    convert = ("convert.__main__", tmp_path / "run" / "final.safetensors", tmp_path / "fused.safetensors", "-a")
    done = command(*convert, net)
    assert done.returncode == 0, done.stderr
    other = write_variant(tmp_path, dataclasses.replace(SMALL, widths=(8, 8, 8, 16, 32), name="other"))
    for refused in (command(*evaluate, other), command(*convert, other, "--overwrite")):
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "holds small, not other" in refused.stderr
