"""Claim: every command accepts a training run, or one of its checkpoints, as a weight file."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import repvgg_jax as rv
from repvgg_jax.trees import flatten, unflatten
from repvgg_jax.weights import WeightsWarning
from repvgg_jax.weights.header import TRAINING, Header
from tests.helpers.commands import command, convert, error_of
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits, refused
from train.checkpoint import Checkpoints, RunFacts
from train.parallel import distribute, replicate
from train.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:.*took checkpoint:repvgg_jax.weights.WeightsWarning")

NAMES = tuple("abcdefghij")
GREY = rv.Preprocessing(32, 1.0, (0.3053,), (0.3783,))
VARIANT = rv.Variant((1, 1, 1, 1), (8, 8, 8, 16, 16), activation="silu", strides=(1, 2, 2, 2, 2))
MODEL = rv.create_model(VARIANT, 10)
TOP1 = {3: 0.5, 6: 0.9, 8: 0.7}
"""Top-1 by step; step 9 has not been evaluated."""


def stats_of_each_device(stats: dict) -> dict:
    """Return `[devices, …]`: statistics that differ between devices and average to `stats`."""
    devices = jax.device_count()
    offsets = np.arange(devices, dtype=np.float32) - (devices - 1) / 2
    return jax.tree.map(lambda leaf: np.stack([leaf + offset / 64 for offset in offsets]), stats)


def state_at(step: int) -> tuple[TrainState, dict, dict]:
    """Return a state as in the parallel step, its variables, and their moving average."""
    trained, average = (random_variables(MODEL, seed, in_channels=1) for seed in (step, 100 + step))
    optimizer = optax.sgd(0.1, momentum=0.9).init(trained["params"])
    shared = (np.int32(step), trained["params"], optimizer, average["params"])
    number, params, opt_state, ema_params = (replicate(tree) for tree in shared)
    per_device = (distribute(stats_of_each_device(v["batch_stats"])) for v in (trained, average))
    stats, ema_stats = per_device
    return TrainState(number, params, stats, opt_state, ema_params, ema_stats), trained, average


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A run's folder, and its variables and their averages by step."""
    workdir = tmp_path_factory.mktemp("runs") / "lr=[0.1]"
    workdir.mkdir()
    net = Header(TRAINING, VARIANT, 10, GREY, NAMES).to_json()
    facts = RunFacts(0, 64, 1437, jax.device_count(), net=net)
    trained, averages = {}, {}
    with Checkpoints(workdir, 9) as checkpoints:
        for step in (3, 6, 8, 9):
            state, trained[step], averages[step] = state_at(step)
            checkpoints.save(state, facts, TOP1.get(step))
    rows = [{"step": 3, "loss": 1.0}, *({"step": s, "form": "train", "top1": top1} for s, top1 in TOP1.items())]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return workdir, trained, averages


def assert_same(expected: dict, actual: dict) -> None:
    """Check that parameters are equal bit for bit, and statistics up to the rounding of their average."""
    assert_same_bits({"params": expected["params"]}, {"params": actual["params"]})
    jax.tree.map(
        lambda e, f: np.testing.assert_allclose(f, e, rtol=2e-6, atol=2e-6),
        expected["batch_stats"],
        actual["batch_stats"],
    )


def test_a_run_stands_for_its_best_checkpoint_and_a_checkpoint_for_itself(run):
    workdir, trained, averages = run
    for folder, step in (
        (workdir, 6),
        (workdir / "checkpoints", 6),
        (f"{workdir}/", 6),
        (workdir / "checkpoints" / "8", 8),
        (workdir / "checkpoints" / "9", 9),
    ):
        model, variables = rv.load_weights(folder)
        assert model == MODEL
        assert_same(trained[step], variables)
        assert_same(averages[step], rv.load_weights(folder, ema=True)[1])
    with pytest.warns(WeightsWarning, match=r"took checkpoint 6, the best of 4, with top-1 90\.00 %"):
        rv.load_weights(workdir)


def test_a_run_is_inspected_without_reading_its_weights(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)  # importing it fails
    info = rv.inspect_weights(run[0])
    assert (info.preprocessing, info.class_names, info.variant, info.deploy) == (GREY, NAMES, VARIANT, False)
    assert (info.in_channels, info.num_classes, info.num_batches_tracked) == (1, 10, 6)
    assert "pip install orbax-checkpoint" in refused(run[0])
    shown = convert("--inspect", run[0]).stdout
    assert "training form, native names, 10 classes, 1 input channels" in shown


def test_without_an_evaluation_a_run_stands_for_its_newest_checkpoint(run, tmp_path):
    for step in (8, 9):
        shutil.copytree(run[0] / "checkpoints" / str(step), tmp_path / "run" / "checkpoints" / str(step))
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "metrics", ignore_errors=True)
    with pytest.warns(WeightsWarning, match="took checkpoint 9, the newest; none has been evaluated"):
        assert_same(run[1][9], rv.load_weights(tmp_path / "run")[1])


def test_every_command_accepts_a_run(run, tmp_path):
    workdir, trained, averages = run
    assert convert(workdir, tmp_path / "best.safetensors", "--keep-training-form").returncode == 0
    info = rv.inspect_weights(tmp_path / "best.safetensors")
    assert (info.preprocessing, info.class_names, info.num_batches_tracked) == (GREY, NAMES, 6)
    assert_same(trained[6], rv.load_weights(tmp_path / "best.safetensors")[1])
    assert convert(workdir / "checkpoints/8", tmp_path / "ema.pth", "--ema", "--keep-training-form").returncode == 0
    assert_same(averages[8], rv.load_weights(tmp_path / "ema.pth")[1])

    def evaluation(weights: Path, *options: str) -> dict:
        arguments = ("digits", "deploy", weights, "--data-dir", tmp_path / "data", *options)
        done = command("train.evaluate", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    (tmp_path / "names").write_text("\n".join(map(str, range(10))), encoding="utf-8")
    names = ("--class-names", str(tmp_path / "names"))
    assert evaluation(workdir, *names) == evaluation(tmp_path / "best.safetensors", *names)


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoints of a training run" in refused(tmp_path / "empty")
    (tmp_path / "begun" / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    assert "holds no checkpoints of a training run" in refused(tmp_path / "begun")
    assert "holds no checkpoints" in error_of(convert(tmp_path / "empty", tmp_path / "out.pth"))


class Copy:
    """A copy of the checkpoint of step 6, to be damaged, in a folder that says step 7."""

    def __init__(self, run: Path, folder: Path):
        self.path = Path(shutil.copytree(run / "checkpoints" / "6", folder / "7"))
        self.facts_file = self.path / "facts" / "metadata"
        self.facts = json.loads(self.facts_file.read_text(encoding="utf-8"))

    def write(self, facts: dict[str, Any]) -> None:
        """Replace what the checkpoint says about itself."""
        self.facts_file.write_text(json.dumps(facts), encoding="utf-8")


@pytest.fixture
def checkpoint(run, tmp_path) -> Copy:
    return Copy(run[0], tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        lambda facts: {"crc32": facts["crc32"] ^ 1},
        lambda facts: {"shapes": {**facts["shapes"], "['params']['linear']['bias']": [11]}},
        lambda facts: {"shapes": {k: v for k, v in facts["shapes"].items() if "stage3" not in k}},
        lambda facts: {"shapes": 3},
        lambda facts: {"facts": {**facts["facts"], "net": {"version": 1}}},
    ],
    ids=["another checksum", "another shape", "a missing stage", "no shapes", "no net"],
)
def test_a_checkpoint_with_wrong_facts_is_named_in_one_line(changed, checkpoint):
    checkpoint.write(checkpoint.facts | changed(checkpoint.facts))
    assert "/7" in refused(checkpoint.path)


def test_facts_that_are_not_json_are_a_damaged_checkpoint(checkpoint):
    checkpoint.facts_file.write_text("{", encoding="utf-8")
    assert "damaged checkpoint" in refused(checkpoint.path)


def test_a_truncated_state_file_is_a_damaged_checkpoint(checkpoint):
    files = [path for path in (checkpoint.path / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert "damaged checkpoint" in refused(checkpoint.path)


def test_a_checkpoint_without_its_net_is_refused_with_the_reason(checkpoint):
    del checkpoint.facts["facts"]["net"]
    checkpoint.write(checkpoint.facts)
    assert "does not say which net it is" in refused(checkpoint.path)


def test_a_missing_moving_average_is_refused(checkpoint):
    shapes = {name: shape for name, shape in checkpoint.facts["shapes"].items() if "ema" not in name}
    checkpoint.write(checkpoint.facts | {"shapes": shapes})
    assert "has no moving average" in refused(checkpoint.path, ema=True)


def test_ranges_of_quantisation_aware_training_are_ignored(tmp_path):
    state, trained, _ = state_at(5)
    ranges = {"batch_stats/stage0/input_range": np.ones(jax.device_count(), np.float32)}
    stats = unflatten(flatten({"batch_stats": jax.device_get(state.batch_stats)}) | ranges)["batch_stats"]
    facts = RunFacts(0, 64, 1437, jax.device_count(), net=Header(TRAINING, VARIANT, 10, GREY).to_json())
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(dataclasses.replace(state, batch_stats=distribute(stats)), facts)
    assert_same(trained, rv.load_weights(tmp_path)[1])


@pytest.mark.slow
def test_the_last_checkpoint_of_a_real_run_is_its_final_weights(uninterrupted):
    last = max((uninterrupted / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for ema, name in ((False, "final"), (True, "ema")):
        assert_same_bits(rv.load_weights(uninterrupted / f"{name}.safetensors")[1], rv.load_weights(last, ema=ema)[1])
    actual, expected = rv.inspect_weights(last), rv.inspect_weights(uninterrupted / "final.safetensors")
    assert actual == expected
