"""Claim: a workdir that fills up, at any moment, gives one clear line, and everything in it is complete."""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables
from train.checkpoint import Checkpoints, RunFacts
from train.metrics import MetricsLog, read_rows
from train.parallel import replicate, to_host
from train.plot import plot_curves
from train.recipe import Recipe
from train.state import TrainState
from train.workdir import claimed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small tmpfs"),
]

FACTS = RunFacts(seed=0, batch_size=4, train_images=8, devices=4)
MODEL = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8)), 3)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some KB, once, and unmounts it afterwards."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not allowed on this system")
        mounted.append(tmp_path)
        return tmp_path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def state_at(step: int) -> TrainState:
    noise = np.random.default_rng(step).normal(size=2000).astype(np.float32)  # does not compress
    return TrainState(
        jnp.asarray(step, jnp.int32), {"kernel": jnp.asarray(noise)}, {"mean": jnp.zeros(2)}, (jnp.ones(3),)
    )


def run_to_the_end(workdir: Path) -> None:
    """Write everything that a run writes, in the same order."""
    with claimed(Recipe(), workdir), Checkpoints(workdir, 2, print) as checkpoints:
        log = MetricsLog(workdir, 0)
        for step in range(1, 15):
            row = {"step": step, "epoch": 1.0, "loss": 1.0, "top1": 0.5, "learning_rate": 0.1}
            log.write(row, "train")
            checkpoints.save(replicate(state_at(step)), FACTS, 0.5 if step == 2 else None)
        checkpoints.wait()
        rv.save_weights(workdir / "final.safetensors", MODEL, random_variables(MODEL))
        plot_curves([workdir], workdir / "curves.png")
        log.close()


@pytest.mark.parametrize("kilobytes", [40, 60, 80, 120, 160, 200, 220, 240, 260, 400, 1000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(kilobytes, small_disk):
    workdir, error = small_disk(kilobytes) / "run", None
    try:
        run_to_the_end(workdir)
    except rv.RepVGGError as caught:
        error = str(caught)
    if kilobytes <= 120:
        assert error is not None
    if kilobytes >= 400:
        assert error is None
    if error is not None:
        assert error.startswith("cannot write ")
        assert "\n" not in error
        assert len(error) < 500
    rows = read_rows(workdir / "metrics.jsonl") if workdir.exists() else []
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    if (workdir / "config.json").exists():
        json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    if (workdir / "final.safetensors").exists():
        rv.load_weights(workdir / "final.safetensors")
    complete = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if complete and kilobytes >= 160:  # opening them also writes a few bytes
        with Checkpoints(workdir, 2, print) as checkpoints:
            state = to_host(checkpoints.restore(state_at(0), FACTS))
        np.testing.assert_array_equal(state.params["kernel"], state_at(int(state.step)).params["kernel"])
        assert int(state.step) == max(int(path.name) for path in complete)
