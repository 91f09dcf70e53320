"""Claim: killed, stopped, or with a damaged checkpoint, a run started again ends with exactly the same weights."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from repvgg_jax.weights.training_run import evaluations
from tests.helpers.commands import command
from tests.helpers.runs import is_alive, rows, weights, without_times, worker_processes

pytestmark = pytest.mark.slow


def same_result(workdir: Path, expected: Path) -> None:
    for name in ("final", "deploy", "ema", "ema_deploy"):
        assert weights(workdir, name) == weights(expected, name), name
    evaluations = [[row for row in rows(folder) if "form" in row] for folder in (workdir, expected)]
    assert without_times(evaluations[0]) == without_times(evaluations[1])


def wait_for(condition, seconds: float = 120, poll: float = 0.01) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(poll)


def steps_in(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def writing(workdir: Path) -> bool:
    """Return whether a checkpoint is being written: orbax writes under a temporary name."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def kill_at_random_moments(start, workdir: Path, times: int, seed: int) -> tuple[int, int]:
    """Kill and restart a run; return how many kills found it alive, and how many left a half-written checkpoint."""
    chance, alive, during_write = random.Random(seed), 0, 0
    for number in range(times):
        process, before = start(), steps_in(workdir)
        if number % 4 == 0:
            time.sleep(chance.uniform(0, 8))  # starting, restoring, compiling, perhaps training
        elif number % 4 == 1:
            wait_for(functools.partial(has_moved_on, workdir, before, process))
            time.sleep(chance.uniform(0, 0.3))  # training, evaluating, saving
        else:
            wait_for(functools.partial(writing_or_over, workdir, process), poll=0.0005)
            time.sleep(chance.uniform(0, 0.003))
        alive += process.poll() is None
        process.kill()
        process.communicate()
        during_write += writing(workdir)
    return alive, during_write


def has_moved_on(workdir: Path, before: list[int], process: subprocess.Popen) -> bool:
    return steps_in(workdir) != before or process.poll() is not None


def has_reached(workdir: Path, step: int, process: subprocess.Popen) -> bool:
    return max(steps_in(workdir), default=0) >= step or process.poll() is not None


def writing_or_over(workdir: Path, process: subprocess.Popen) -> bool:
    return writing(workdir) or process.poll() is not None


def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_bits(runs, tmp_path):
    options: dict = dict(epochs=15, checkpoint_every=5, evaluate_every=5, ema_decay=0.99)
    whole = runs.finish(tmp_path / "whole", **options)
    assert whole.returncode == 0, whole.stderr
    workdir = tmp_path / "run"
    alive, during_write = kill_at_random_moments(
        functools.partial(runs.start, workdir, **options), workdir, times=20, seed=0
    )
    assert alive >= 18, "the run was over too soon for the kills to mean anything"
    assert during_write, "no kill hit a write, so that was not tested"
    done = runs.finish(workdir, **options)
    assert done.returncode == 0, done.stderr
    same_result(workdir, tmp_path / "whole")


def test_a_killed_run_leaves_no_worker_process_and_a_killed_worker_process_ends_the_run(runs, uninterrupted, tmp_path):
    """The system may kill either when memory is short. The same command continues, with or without processes."""
    workdir = tmp_path / "run"
    for victim in ("the run", "a worker"):
        before = steps_in(workdir)
        process = runs.start(workdir, ema_decay=0.99, worker_processes=2, checkpoint_every=1)
        wait_for(functools.partial(has_moved_on, workdir, before, process), seconds=300)
        workers = worker_processes(process)
        assert len(workers) == 2, process.communicate()
        os.kill(process.pid if victim == "the run" else workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        wait_for(lambda workers=workers: not any(is_alive(worker) for worker in workers))
        if victim == "a worker":
            assert process.returncode == 2
            assert "error: a worker process was ended by SIGKILL" in err
            assert len(err.splitlines()) == 1, err
    runs.finish(workdir, ema_decay=0.99)
    same_result(workdir, uninterrupted)


def test_the_same_checkpoints_are_kept_however_often_the_run_is_killed(runs, tmp_path):
    """The best of those evaluated while training, three epochs apart, is one of them."""
    options: dict = dict(epochs=16, checkpoint_every=10, evaluate_every=3, learning_rate=2, ema_decay=0.9)
    assert runs.finish(tmp_path / "whole", **options).returncode == 0
    workdir = tmp_path / "run"
    for last in (70, 130, 210, 280):
        process = runs.start(workdir, **options)
        wait_for(functools.partial(has_reached, workdir, last, process))
        process.kill()
        process.communicate()
    assert runs.finish(workdir, **options).returncode == 0
    same_result(workdir, tmp_path / "whole")
    assert steps_in(workdir) == steps_in(tmp_path / "whole")
    # Rounded because metrics.jsonl, the source for deleted checkpoints, keeps six digits.
    top1 = {step: round(value, 5) for step, value in evaluations(workdir / "checkpoints").items() if step % 66 == 0}
    best = max(step for step in top1 if top1[step] == max(top1.values()))
    assert best in steps_in(workdir)
    assert best not in steps_in(workdir)[-2:]  # those are kept as the newest


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(runs, tmp_path):
    first = runs.start(tmp_path / "run", epochs=100)
    wait_for(lambda: steps_in(tmp_path / "run"))
    second = runs.finish(tmp_path / "run", epochs=100)
    assert second.returncode == 2
    assert f"is in use by process {first.pid} on " in second.stderr
    assert second.stderr.count("\n") == 1
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = runs.start(tmp_path / "run", epochs=100)
    before = steps_in(tmp_path / "run")
    wait_for(lambda: steps_in(tmp_path / "run") != before)
    third.kill()
    third.communicate()


def test_the_forms_of_a_bfloat16_run_are_compared_in_float32(runs, tmp_path):
    done = runs.finish(tmp_path / "run", dtype="bfloat16", accumulate=2)
    assert done.returncode == 0, done.stderr
    stdout = " ".join(done.stdout.split())
    assert "training form and deploy form, both computed in float32, predict the same class for 360 of 360" in stdout
    printed = json.loads(done.stdout.splitlines()[-1])
    for form, name in (("train", "final"), ("deploy", "deploy")):
        arguments = ("digits", form, tmp_path / "run" / f"{name}.safetensors", "--data-dir", runs.data)
        assert json.loads(command("train.evaluate", *arguments).stdout)["top1"] == printed[f"test_top1_{form}_form"]


def test_sigterm_saves_at_once_and_the_same_command_continues(runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, ema_decay=0.99)
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(rows(workdir)) >= 1)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, (out, err)
    assert time.monotonic() - start < 20
    stopped = steps_in(workdir)[-1]
    assert f"SIGTERM: stopped after step {stopped}, state saved" in " ".join(out.split())
    done = runs.finish(workdir, ema_decay=0.99)
    assert f"resuming at step {stopped}" in " ".join(done.stdout.split())
    same_result(workdir, uninterrupted)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, ema_decay=0.99)
    wait_for(lambda: steps_in(workdir))
    process.kill()
    process.communicate()
    kept = steps_in(workdir)
    full = runs.finish(workdir, ema_decay=0.99, largest_file=4096)
    assert full.returncode == 2
    assert len(full.stderr.splitlines()) == 1, full.stderr
    line = full.stderr.rstrip()
    assert line.startswith("error: cannot write the checkpoint of step ")
    assert "File too large" in line
    assert line.endswith(f"the checkpoint of step {kept[-1]} is kept")
    assert runs.finish(workdir, ema_decay=0.99).returncode == 0
    same_result(workdir, uninterrupted)


def test_a_damaged_newest_checkpoint_is_skipped(runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, ema_decay=0.99)
    wait_for(lambda: len([step for step in steps_in(workdir) if step >= 20]) >= 2)
    process.kill()
    process.communicate()
    newest = steps_in(workdir)[-1]
    state = workdir / "checkpoints" / str(newest) / "state"
    for path in sorted(state.rglob("*")):
        if path.is_file() and path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0x40
            path.write_bytes(content)
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 0, done.stderr
    stdout = " ".join(done.stdout.split())
    assert f"/{newest} is damaged" in stdout
    assert "resuming at step" in stdout
    same_result(workdir, uninterrupted)


def test_without_any_readable_checkpoint_the_run_says_so(runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 2
    assert "can be read" in done.stderr
    assert "they are left as they are; choose another --workdir to start again" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_started_again_changes_nothing(runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 0, done.stderr
    same_result(workdir, uninterrupted)
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["test_top1_train_form"] > 0.2
    assert printed["test_top1_train_form"] == printed["train_top1"], "the name in 0.1, until 0.3"
    assert "both computed in float32" in " ".join(done.stdout.split())


def test_other_options_in_the_same_workdir_are_refused(runs, uninterrupted):
    done = runs.finish(uninterrupted, ema_decay=0.5)
    assert done.returncode == 2
    assert "ema_decay 0.99 -> 0.5" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_number_of_devices_resumes_with_a_warning(runs, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, devices=2)
    wait_for(lambda: steps_in(workdir) != [])
    process.kill()
    process.communicate()
    done = runs.finish(workdir, devices=4)
    assert done.returncode == 0, done.stderr
    assert "resuming a run of 2 devices on 4" in " ".join(done.stdout.split())
    assert rows(workdir)[-1]["top1"] > 0.2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_state(runs, tmp_path):
    workdir = tmp_path / "run"
    done = runs.finish(workdir, learning_rate=1e9, warmup_epochs=1.5, checkpoint_every=2)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    for words in ("the loss is", "at step", "learning rate", "gradient norm", "last good checkpoint is kept"):
        assert words in done.stderr
    reported = int(done.stderr.split("at step ")[1].split()[0])
    assert steps_in(workdir)
    assert steps_in(workdir)[-1] < reported
    assert not (workdir / "final.safetensors").exists()


def test_an_unwritable_workdir_is_one_line(runs, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = runs.finish(tmp_path / "file" / "run")
    assert done.returncode == 2
    assert "cannot create --workdir" in done.stderr
    assert done.stderr.count("\n") == 1
