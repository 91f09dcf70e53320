"""Claim: a mistake in a benchmark's command line gives one line that names the option, and nothing is measured."""

import importlib

import pytest

from repvgg_jax.errors import ConfigError, RepVGGError, UnknownModelError


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("first_prediction", "--rounds 0", "--rounds: must be a positive whole number, not 0"),
        ("inference", "--batch-sizes 1 x", "--batch-sizes: must be a positive whole number, not x"),
        ("input", "--seconds -1", "--seconds: must be a positive number, not -1"),
        ("int8", "--model", "--model: expected one argument"),
        ("load_weights", "--models RepVGG-A0", "unrecognized arguments: --models RepVGG-A0"),
        ("pmap_cost", "--devices two", "--devices: must be a positive whole number, not two"),
        ("serving", "--seconds nan", "--seconds: must be a positive number, not nan"),
        ("throughput", "", "the following arguments are required: output"),
        ("train_step", "--image-size 1.5", "--image-size: must be a positive whole number, not 1.5"),
        ("gpu", "--sections speed", "--sections: invalid choice: 'speed'"),
        ("cifar10_pytorch", "photos --seeds x", "--seeds takes"),
        ("int8_accuracy", "runs --epochs x", "--epochs takes an integer, not x"),
        ("int8_weights", "w.pth o.png --width 3", "unknown option --width"),
    ],
)
def test_a_wrong_option_is_named(name: str, words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, *words.split()])
    with pytest.raises(ConfigError) as raised:
        importlib.import_module(f"benchmarks.{name}").main()
    line = str(raised.value)
    assert line.startswith(message)
    assert line.endswith(f"see python -m benchmarks.{name} --help")
    assert "\n" not in line


def test_an_unknown_model_is_found_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_step", "--models", "RepVGG-A0", "RepVGG-A9"])
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(UnknownModelError, match="did you mean RepVGG-A2"):
        importlib.import_module("benchmarks.train_step").main()


def test_a_worker_that_dies_is_an_error_of_one_line() -> None:
    contest = importlib.import_module("benchmarks.contest")
    with pytest.raises(RepVGGError, match=r"^torch has died \(exit status 2\)$"):
        contest.Contestant("torch", "benchmarks.inference", ["--rounds", "0"])
