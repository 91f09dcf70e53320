"""Claim: `--help` shows no default that is None or empty, no `{None}`, and changes nothing about the command line."""

import re
from typing import Any

import pytest

from convert.__main__ import Arguments as Convert
from repvgg_jax.command_help import plain_help
from tests.helpers.commands import command
from train.evaluate import Arguments as Evaluate
from train.plot import Arguments as Plot
from train.presets import PRESETS, parse

COMMANDS = [
    ("train.main",),
    ("train.main", "--preset", "cifar10"),
    ("train.evaluate",),
    ("train.plot",),
    ("convert.__main__",),
    ("repvgg_jax.__main__", "summary"),
    ("repvgg_jax.__main__", "predict"),
    ("repvgg_jax.__main__", "show"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_no_default_that_says_nothing(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = command(*words, "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(re.sub(r"[^\x00-\x7f]", " ", done.stdout).split())
    assert "(default:" in text or words == ("repvgg_jax.__main__", "summary")
    for wrong in ("(default: None)", "(default: )", "(default: '')", "{None}", "{None,"):
        assert wrong not in text, wrong


def test_metavars_name_one_value_or_several():
    done = command("train.main", "--preset", "cifar10", "--help")
    for shown in ("--image-size INT", "--mean FLOAT [FLOAT ...]", "--block {repvgg,qarepvgg}", "--data-dir STR"):
        assert shown in done.stdout, shown
    blocks = " ".join(map(str, PRESETS["cifar10"].model.num_blocks or ()))
    assert f"(default: {blocks})" in " ".join(done.stdout.replace("│", " ").split())  # what the preset sets is shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            Convert,
            ["a.pth", "b.onnx", "--mean", "0.5", "0.4", "0.3", "--input-layout", "None", "--check-images", "x", "y"],
        ),
        (
            Convert,
            ["a.pth", "b.pth", "--epsilon", "None", "-a", "RepVGG-A0", "--to", "timm", "--class-names", "p", "q"],
        ),
        (Evaluate, ["photos", "deploy", "w.pth", "-r", "320", "--ema", "--std", "None"]),
        (Plot, ["a", "b", "--out", "c.svg"]),
        (Plot, []),
    ],
)
def test_command_lines_are_parsed_as_by_tyro_alone(arguments: Any, words: list[str]):
    import tyro

    assert tyro.cli(arguments, args=words, registry=plain_help()) == tyro.cli(arguments, args=words)


def test_none_still_removes_a_preset_s_value():
    recipe = parse(["--preset", "cifar10", "--image-size", "None", "--mean", "None"])
    assert (recipe.input.image_size, recipe.input.mean) == (None, None)
