"""Claim: a command line that cannot be parsed gets one line that names the option, what it takes, and the help."""

import pytest

from repvgg_jax.command_errors import one_line
from tests.helpers.commands import command, error_of

PREDICT = ("repvgg_jax.__main__", "predict", "w.pth", "cat.jpg")
TRAIN = ("train.main", "--preset", "digits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("repvgg_jax.__main__",), "the subcommand is missing: one of summary, predict, show"),
        (
            ("repvgg_jax.__main__", "pedict", "w.pth"),
            "unknown subcommand pedict: it must be one of summary, predict",
        ),
        (("repvgg_jax.__main__", "predict"), "WEIGHTS is missing; see python -m repvgg_jax predict --help"),
        (("train.evaluate", "photos"), "{train,deploy}, WEIGHTS are missing"),
        (("train.evaluate", "photos", "dploy", "w.pth"), "FORM must be one of train, deploy, not dploy"),
        (("train.evaluate", "photos", "deploy", "w.pth", "more"), "too many arguments: more"),
        (("examples.finetune.split", "photos"), "OUT is missing; see python -m examples.finetune.split --help"),
        (("examples.finetune.split", "photos", "out", "--val", "x"), "--val takes a number, not x"),
        ((*PREDICT, "--format", "xml"), "--format must be one of text, csv, json, not xml"),
        ((*PREDICT, "--topk", "3"), "unknown option --topk (did you mean --top?)"),
        ((*PREDICT, "--top"), "--top needs a value"),
        ((*PREDICT, "--top", "1.5"), "--top takes an integer, not 1.5"),
        ((*PREDICT, "--image-size", "x"), "--image-size takes an integer, not x"),
        ((*PREDICT, "-b", "x"), "--batch-size takes an integer, not x"),
        ((*PREDICT, "--mean", "0.5", "x"), "--mean takes numbers, not 0.5 x"),
        ((*TRAIN, "--batchsize", "3"), "unknown option --batchsize (did you mean --batch-size?)"),
        ((*TRAIN, "--epochs", "ten"), "--epochs takes an integer, not ten; see python -m train.main --help"),
        ((*TRAIN, "--strides", "1", "2", "x"), "--strides takes integers, not 1 2 x"),
        ((*TRAIN, "--quantization", "int8"), "--quantization must be one of none, qat, not int8"),
        ((*TRAIN, "--crop-area", "0.1"), "--crop-area needs 2 values"),
        (
            ("convert.__main__", "a", "b", "--input-layout", "CHW"),
            "--input-layout must be one of NCHW, NHWC, not CHW",
        ),
    ],
)
def test_an_unparsable_command_line_gets_one_line(words, message):
    error = error_of(command(*words))
    assert error.startswith("error: ")
    assert message in error
    assert " --help" in error


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_line_does_not_depend_on_the_terminal_s_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    error = error_of(command(*TRAIN, "--quantization", "int8"))
    assert error == "error: --quantization must be one of none, qat, not int8; see python -m train.main --help\n"


def test_a_box_of_another_kind_keeps_its_words():
    box = "╭─ Some error ─╮\n│ It went      │\n│ wrong.       │\n│ ──────────── │\n│ More.        │\n╰──────────────╯\n"
    assert one_line(box) == "It went wrong."
    assert one_line("error: no box\n  at all\n") == "error: no box at all"
