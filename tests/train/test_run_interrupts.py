"""Claim: a training run stopped by Ctrl-C or another signal saves its state, and later ends with the same weights."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import ROOT, is_alive, rows, weights, worker_processes
from tests.helpers.xla_flags import xla_flags
from tests.train.test_processes import start_two
from tests.train.test_resume import same_result, steps_in, wait_for

pytestmark = pytest.mark.slow


def until_it_trains(process: subprocess.Popen, workdir) -> None:
    """Wait for the first row of metrics."""
    log = workdir / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (log.exists() and log.read_text(encoding="utf-8")), seconds=400)
    assert process.poll() is None, process.communicate()


def stopped_after(out: str, name: str) -> int:
    """Return the step after which a run says it stopped."""
    words = " ".join(out.split())
    assert f"{name}: stopped after step " in words, words
    assert "state saved; run the same command again to resume" in words
    return int(words.split("stopped after step ")[1].split(",")[0])


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_saves_at_once_and_the_same_command_continues(name, runs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, ema_decay=0.99)
    until_it_trains(process, workdir)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name), (out, err)
    assert "Traceback" not in err
    step = stopped_after(out, name)
    assert steps_in(workdir)[-1] == step
    done = runs.finish(workdir, ema_decay=0.99)
    assert f"resuming at step {step}" in " ".join(done.stdout.split())
    same_result(workdir, uninterrupted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_worker_processes_get_too_is_handled_by_the_run(name, runs, uninterrupted, tmp_path):
    """Ctrl-C reaches every process of a terminal's group, and Slurm's signals every process of a job step."""
    workdir = tmp_path / "run"
    process = runs.start(workdir, ema_decay=0.99, worker_processes=2)
    until_it_trains(process, workdir)
    workers = worker_processes(process)
    assert len(workers) == 2
    for number in (process.pid, *workers):
        os.kill(number, getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name), (out, err)
    assert "Traceback" not in err
    assert "Warning" not in err
    stopped_after(out, name)
    assert not any(is_alive(worker) for worker in workers)
    runs.finish(workdir, ema_decay=0.99, worker_processes=2)
    same_result(workdir, uninterrupted)


def test_a_second_ctrl_c_ends_a_run_whose_data_hangs(runs, tmp_path):
    """After the first, it would wait for a step that never comes."""
    script = tmp_path / "hanging.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    from repvgg_jax.cli import run_module\n"
        "    run_module('hanging')\n"
        "import sys, threading\n"
        "from train.main import main\n"
        "from train.data import batches\n"
        "read = batches.Images._read\n"
        "def hang(*arguments):\n"
        "    hang.count = getattr(hang, 'count', 0) + 1\n"
        "    if hang.count > 2000:\n"
        "        threading.Event().wait()\n"
        "    return read(*arguments)\n"
        "batches.Images._read = hang\n",
        encoding="utf-8",
    )
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(script), *runs.words(workdir, log_every=1, evaluate_every=2)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until_it_trains(process, workdir)

    def hangs() -> bool:
        before = len(rows(workdir))
        time.sleep(3)
        return len(rows(workdir)) == before

    wait_for(hangs)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130, (out, err)
    assert "press Ctrl-C again to stop without saving" in err
    assert err.endswith("interrupted\n")


@pytest.mark.parametrize("everybody", [True, False])
def test_ctrl_c_stops_all_processes_of_a_run_at_one_step(everybody, runs, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(runs, workdir, epochs=30, evaluate_every=10)
    try:
        until_it_trains(processes[0], workdir)
        for process in processes if everybody else processes[1:]:
            process.send_signal(signal.SIGINT)
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130 if everybody else 143, 130], outputs
    assert all("Traceback" not in err for _, err in outputs)
    step = stopped_after(outputs[0][0], "SIGINT" if everybody else "SIGTERM")
    assert steps_in(workdir)[-1] == step


def test_on_a_terminal_the_bar_disappears_and_the_cursor_is_restored(runs, tmp_path):
    workdir = tmp_path / "run"
    ours, its = pty.openpty()
    command = runs.command(workdir, epochs=30)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=its, stderr=its)
    os.close(its)
    log, shown = workdir / "metrics.jsonl", b""
    while not (log.exists() and log.read_text(encoding="utf-8")):
        shown += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=30) == 130
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"Traceback" not in shown


def test_interrupts_at_random_moments_end_cleanly(tmp_path):
    """A few of the hundreds that `python -m tests.attack.interrupts` sends."""
    words = [sys.executable, "-m", "tests.attack.interrupts", "--count", "8", "--resumed", "2", "--seed", "7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    once, again = (json.loads(line) for line in done.stdout.splitlines())
    assert (once["attempts"], once["failed"], again["failed"]) == (10, 0, 0)


def test_a_run_stopped_after_its_last_step_resumes_with_its_end(runs, uninterrupted, tmp_path):
    """A signal between the last step and the last evaluation is not lost."""
    script = tmp_path / "last_step.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    from repvgg_jax.cli import run_module\n"
        "    run_module('last_step')\n"
        "import os, signal, sys, time\n"
        "from train.main import main\n"
        "from train.checkpoint import Checkpoints\n"
        "save = Checkpoints.save\n"
        "def then_interrupt(self, state, *arguments, **options):\n"
        "    save(self, state, *arguments, **options)\n"
        "    if int(state.step.reshape(-1)[0]) == 44:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.5)\n"
        "Checkpoints.save = then_interrupt\n",
        encoding="utf-8",
    )
    workdir = tmp_path / "run"
    words = [sys.executable, str(script), *runs.words(workdir, ema_decay=0.99)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert stopped_after(done.stdout, "SIGINT") == 44
    assert not (workdir / "final.safetensors").exists()
    assert runs.finish(workdir, ema_decay=0.99).returncode == 0
    assert weights(workdir) == weights(uninterrupted)
