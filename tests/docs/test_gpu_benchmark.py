"""Claim: `benchmarks.gpu` runs with what a CUDA image contains, stops in time, and keeps RESULTS.md a table."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.contest import Contestant, ContestantDiedError
from benchmarks.gpu import append_row
from benchmarks.gpu_budget import Clock
from tests.helpers.repository import ROOT
from tests.helpers.runs import environment

DEVICE = {"device": "GPU", "versions": "jax 1", "product_tflops": 750.4, "copy_gb_per_second": 4000.0}


def test_a_new_row_is_appended_to_the_table(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("| date |\n|---|\n| old |\n\nMore text.\n", encoding="utf-8")
    clock = Clock(0)
    assert not clock.allows("profile", 1)
    append_row(path, DEVICE, ["A0: 1 | 2"], clock)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[2] == "| old |"
    assert lines[3].endswith("jax 1 | A0: 1 / 2; not measured for lack of time: profile |")
    assert lines[4:] == ["", "More text."]


class Sleeper(Contestant):
    """A worker that never becomes ready."""

    def __init__(self):
        self.name = "sleeper"
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_compilation_that_exceeds_the_time_limit_is_stopped_and_named():
    clock, sleeper = Clock(0.5 / 60), Sleeper()
    with clock.stops("train step", [sleeper]):
        sleeper.expect_ready()
    assert clock.left_out == ["train step"]


def test_a_worker_that_crashes_is_an_error():
    clock, sleeper = Clock(1), Sleeper()
    sleeper.kill()
    with pytest.raises(ContestantDiedError), clock.stops("train step", [sleeper]):
        sleeper.expect_ready()


IMPORTS = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "tyro", "simplejpeg", "grain", "array_record", "sklearn", "onnx"):
    sys.modules[name] = None
import benchmarks.gpu, benchmarks.gpu_workers, benchmarks.train_step, benchmarks.resnet
import tests.helpers.random_weights, tests.helpers.torch_oracle
import train.presets, train.recipe, train.optimizer, train.parallel, train.state, train.step, train.utilization
import repvgg_jax
repvgg_jax.make_predictor
"""


def test_it_imports_only_what_a_cuda_image_contains():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_dry_run_covers_every_section(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{number}.png")
    words = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--cifar10", str(tmp_path)]
    run = subprocess.run(words, env=environment(devices=1), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr + run.stdout
    lines = run.stdout.splitlines()
    for start in (
        "RepVGG-A0               ",
        "one train step",
        "RepVGG-A2",
        "train step of RepVGG-A0, batch 2",
        "float32",
        "RepVGG-A0         2",
        "CIFAR-10 (--epochs 1",
    ):
        assert any(line.startswith(start) for line in lines), start
