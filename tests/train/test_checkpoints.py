"""Claim: the best checkpoint survives any number of resumptions, in a folder of any name, and nothing else changes."""

import logging
import shutil
import sys
from pathlib import Path

import absl.logging
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import repvgg_jax as rv
from train.checkpoint import Checkpoints, RunFacts
from train.metrics import MetricsLog
from train.orbax_support import check_folder_name
from train.parallel import replicate, to_host
from train.state import TrainState

FACTS = RunFacts(seed=0, batch_size=4, train_images=8, devices=4)


def state_at(step: int) -> TrainState:
    """Return a state whose values depend on its step."""
    return TrainState(
        jnp.asarray(step, jnp.int32), {"kernel": jnp.full((3,), float(step))}, {"mean": jnp.zeros(2)}, (jnp.ones(3),)
    )


def save(workdir: Path, evaluated: dict[int, float | None], notes: list[str] | None = None) -> None:
    """Open the run's checkpoints as a new process would, and save these steps with their top-1."""
    with Checkpoints(workdir, 2, (notes if notes is not None else []).append) as checkpoints:
        for step, top1 in evaluated.items():
            checkpoints.save(replicate(state_at(step)), FACTS, top1)


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def restored(workdir: Path, notes: list[str] | None = None) -> int:
    """Return the step at which a resumption begins, whose values must be those of that step."""
    with Checkpoints(workdir, 2, (notes if notes is not None else []).append) as checkpoints:
        begun = []
        resumes = bool(steps(workdir))
        state = to_host(checkpoints.restore(state_at(0), FACTS, lambda fresh: begun.append(fresh) or fresh))
        assert len(begun) == (not resumes), "what only a new run needs is not computed for one that resumes"
    np.testing.assert_array_equal(state.params["kernel"], np.full(3, float(state.step), np.float32))
    return int(state.step)


def test_the_best_is_kept_however_often_the_run_is_resumed(tmp_path):
    save(tmp_path, {60: 0.7, 66: 0.9, 70: None})
    for step in (80, 90, 100):
        save(tmp_path, {step: None, step + 3: 0.8})
        assert steps(tmp_path) == [66, step, step + 3]
    save(tmp_path, {150: 0.95, 160: None, 170: None})
    assert steps(tmp_path) == [150, 160, 170], "a better one replaces it"


def test_the_newest_of_equally_good_checkpoints_is_kept_across_interruptions(tmp_path):
    evaluated = {3: 0.2, 6: 0.9, 9: 0.9, 12: 0.1, 15: 0.89, 18: None}
    save(tmp_path / "whole", evaluated)
    for step, top1 in evaluated.items():
        save(tmp_path / "interrupted", {step: top1})
    assert steps(tmp_path / "whole") == steps(tmp_path / "interrupted") == [9, 15, 18]


def test_orbax_itself_finds_the_best(tmp_path):
    save(tmp_path, {3: 0.2, 6: 0.9, 9: 0.5, 12: 0.1})
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["top1"], read_only=True)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        assert manager.best_step() == 6


@pytest.mark.parametrize("damage", ["none of them", "empty", "cut", "a list"])
def test_a_checkpoint_without_a_score_gets_it_from_the_metrics(damage, tmp_path):
    """As earlier versions wrote it, or with that file damaged."""
    log = MetricsLog(tmp_path, 0)
    for step, (trained, averaged) in {3: (0.2, 0.3), 6: (0.5, 0.9), 9: (0.8, 0.1)}.items():
        log.write({"step": step, "epoch": 1.0, "form": "train", "top1": trained}, "test_train")
        log.write({"step": step, "epoch": 1.0, "form": "ema", "top1": averaged}, "test_ema")
        save(tmp_path, {step: max(trained, averaged)})
    log.close()
    for path in (tmp_path / "checkpoints").glob("*/metrics/metrics"):
        if damage == "none of them":
            shutil.rmtree(path.parent)
        else:
            path.write_text(
                {"empty": "", "cut": path.read_text(encoding="utf-8")[:5], "a list": "[1]"}[damage], encoding="utf-8"
            )
    save(tmp_path, {12: None, 15: 0.7})
    assert steps(tmp_path) == [6, 12, 15]


NAMES = ["lr=[0.1]", "[!a]*", "**", "what? {x,y}", "100% #1 of 'Zürich'", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_a_folder_of_any_name_can_be_resumed(name, tmp_path):
    notes = []
    save(tmp_path / name, {1: None, 2: 0.5, 3: None}, notes)
    assert restored(tmp_path / name, notes) == 3
    assert notes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a\\b", "gs:", "s3:"])
def test_a_folder_name_that_would_lose_checkpoints_is_refused(name, tmp_path):
    with pytest.raises(rv.ConfigError, match=r"--workdir .* rename it"):
        check_folder_name("--workdir", tmp_path / name / "run")


def test_unreadable_checkpoints_are_set_aside_and_not_deleted(tmp_path):
    save(tmp_path, {1: 0.5, 2: None, 3: None})
    for step in (2, 3):
        for path in (tmp_path / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
    notes = []
    assert restored(tmp_path, notes) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged", "3.damaged"]
    assert sum("is damaged" in note for note in notes) == 2
    save(tmp_path, {2: None, 3: None})
    assert restored(tmp_path) == 3


@pytest.mark.parametrize("what", ["the workdir", "all checkpoints", "the newest", "every file's contents"])
def test_damage_during_the_run_affects_only_the_damaged_checkpoints(what, tmp_path):
    workdir = tmp_path / "run"
    with Checkpoints(workdir, 2, print) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(replicate(state_at(step)), FACTS, 0.5 if step == 2 else None)
            if step == 4:
                checkpoints.wait()
                damage(workdir, what)
    assert steps(workdir)[-2:] == [5, 6]
    assert restored(workdir) == 6


def damage(workdir: Path, what: str) -> None:
    folders = {"the workdir": ".", "all checkpoints": "checkpoints", "the newest": "checkpoints/4"}
    if what in folders:
        shutil.rmtree(workdir / folders[what])
        return
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_the_advice_is_not_to_delete_possibly_readable_checkpoints(tmp_path):
    save(tmp_path, {1: 0.5, 2: None})
    for path in (tmp_path / "checkpoints").rglob("manifest.ocdbt"):
        path.unlink()
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(rv.RepVGGError, match="left as they are; choose another --workdir") as caught:
        restored(tmp_path)
    assert "remove" not in str(caught.value)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


def global_state() -> tuple:
    """Return state that a library must not change."""
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio")]
    return (sys.unraisablehook, *((logger.level, logger.disabled, tuple(logger.filters)) for logger in loggers))


def test_loggers_and_hooks_are_restored_however_it_ends(tmp_path):
    before = global_state()
    save(tmp_path, {1: None})
    assert global_state() == before
    with Checkpoints(tmp_path, 2, print):
        assert global_state() != before
    with pytest.raises(KeyError), Checkpoints(tmp_path, 2, print):
        raise KeyError
    assert global_state() == before
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(rv.RepVGGError, match=r"cannot (use|read)"), Checkpoints(tmp_path / "file", 2, print):
        pass
    assert global_state() == before


def test_a_warning_of_orbax_is_a_note_and_others_stay_warnings(tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    notes = []
    with Checkpoints(tmp_path, 2, notes.append):
        absl.logging.warning("of somebody else")
        options = ocp.CheckpointManagerOptions(read_only=True)  # which orbax warns about
        ocp.CheckpointManager(tmp_path / "checkpoints", options=options).close()
    assert caplog.messages == ["of somebody else"]
    assert all(note.startswith("orbax: ") for note in notes)
    assert any("Given directory is read only" in note for note in notes)
