"""Claim: Ctrl-C, SIGTERM and SIGHUP end a command cleanly at any moment, and a run saves its state first.

The commands here are small ones that do what the real ones do at such a moment; `tests/attack/interrupts.py` interrupts
real training at random moments.
"""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

PRELUDE = """
    from repvgg_jax.cli import run_module

    if __name__ == "__main__":
        run_module("command")

    import contextlib, gc, os, signal, sys, threading, time
    from pathlib import Path
    from repvgg_jax import files, interrupts

    def ready():
        os.write(1, b"ready\\n")
"""


class Command:
    """A command in one file, in its own folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.words = [sys.executable, str(folder / "command.py")]
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}

    def write(self, body: str) -> None:
        """Write its module, which calls `ready()` when it can be interrupted."""
        (self.folder / "command.py").write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(body), encoding="utf-8")

    def start(self, words: list[str] | None = None, **options) -> subprocess.Popen:
        """Start it, and return when it is ready."""
        pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
        process = subprocess.Popen(
            words or self.words, env=self.environment, cwd=self.folder, start_new_session=True, text=True, **pipes
        )
        if process.stdout is not None:
            assert process.stdout.readline() == "ready\n", process.communicate()
        return process


@pytest.fixture
def command(tmp_path) -> Command:
    return Command(tmp_path)


def ends(process: subprocess.Popen, status: int) -> tuple[str, str]:
    """Wait for the end, check status and the absence of a traceback, and return what it printed."""
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, (out, err)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return out, err


MOMENTS = {
    "importing": "ready(); time.sleep(100)",
    "running": "def main():\n    ready()\n    while True: pass",
    "waiting for a lock": """
        def main():
            ready()
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
    """,
    # Exceptions in a callback of the garbage collector are dropped, and so was the Ctrl-C of one run in six.
    "collecting garbage": """
        def main():
            gc.callbacks.append(lambda phase, info: time.sleep(0.1))
            ready()
            while True:
                gc.collect()
    """,
    "inside a callback from C": """
        import ctypes
        def main():
            kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
            def compare(a, b):
                time.sleep(0.1)
                return 0
            ready()
            while True:
                ctypes.CDLL(None).qsort((ctypes.c_int * 100)(), 100, 4, kind(compare))
    """,
    "swallowing every exception": """
        def main():
            ready()
            while True:
                with contextlib.suppress(BaseException):
                    time.sleep(100)
    """,
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_ctrl_c_ends_a_command_at_once(moment, command):
    command.write(MOMENTS[moment])
    process = command.start()
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == ("", "interrupted\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_it_with_their_own_status(number, status, command):
    command.write(MOMENTS["importing"])
    process = command.start()
    process.send_signal(number)
    assert ends(process, status) == ("", f"stopped by {number.name}\n")


def test_printed_output_is_kept_and_nothing_half_written_is_left(command):
    command.write("""
        def main():
            print("an answer")
            with (
                files.atomic_path("net.onnx") as file,
                files.atomic_folder("net.savedmodel") as folder,
                files.scratch_folder(".scratch-", ".") as scratch,
            ):
                file.write_bytes(b"half a net")
                for path in (folder, scratch):
                    (path / "deep").mkdir()
                    (path / "deep" / "part").write_text("half")
                assert file.exists() and folder.exists() and scratch.exists()
                ready()
                time.sleep(100)
    """)
    process = command.start()
    process.send_signal(signal.SIGINT)
    assert ends(process, 130)[0] == "an answer\n"
    assert {path.name for path in command.folder.iterdir()} <= {"command.py", "__pycache__"}


@pytest.mark.parametrize("attempt", range(5))
def test_a_thread_that_keeps_writing_leaves_nothing_either(attempt, command):
    """The main thread does not see the signal: it may open its file again after it was removed."""
    command.write("""
        def main():
            with files.atomic_path("curves.png") as file, files.scratch_folder(".scratch-", ".") as scratch:
                ready()
                while True:
                    file.write_bytes(b"half a picture")
                    (scratch / "part").write_bytes(b"half")
    """)
    process = command.start()
    time.sleep(0.05 * attempt)
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == ("", "interrupted\n")
    assert {path.name for path in command.folder.iterdir()} <= {"command.py", "__pycache__"}


@pytest.mark.parametrize("attempt", range(5))
def test_files_and_folders_are_complete_or_absent(attempt, command):
    """The signal may come while a file or folder is being put in place."""
    command.write("""
        def main():
            ready()
            for number in range(1_000_000):
                with files.atomic_folder(f"folder{number}") as folder, files.atomic_path(f"file{number}") as file:
                    file.write_bytes(bytes(100))
                    for part in range(10):
                        (folder / str(part)).write_bytes(bytes(100))
    """)
    process = command.start()
    time.sleep(0.2 + 0.05 * attempt)
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == ("", "interrupted\n")
    assert not [path.name for path in command.folder.iterdir() if path.name.startswith(".")]
    folders, written = list(command.folder.glob("folder*")), list(command.folder.glob("file*"))
    assert len(folders) > 10
    assert all(len(list(path.iterdir())) == 10 for path in folders)
    assert {path.stat().st_size for path in written} == {100}


SAVING = """
    def main():
        interrupts.defer(lambda number: interrupts.say(f"heard {number.name}"))
        ready()
        while interrupts.requested() is None:
            time.sleep(0.01)
        time.sleep(SECONDS)
        Path("saved").write_text("state")
        print("saved")
        sys.exit(128 + interrupts.requested())
"""


@pytest.mark.parametrize(
    "signals", [("SIGINT",), ("SIGTERM",), ("SIGHUP",), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
def test_a_deferred_signal_requests_that_the_state_be_saved(signals, command):
    command.write(SAVING.replace("SECONDS", "0.5"))
    process = command.start()
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    out, err = ends(process, 128 + getattr(signal, signals[0]))
    assert (out, err) == ("saved\n", f"heard {signals[0]}\n")


def test_a_second_ctrl_c_does_not_wait_for_the_state(command):
    command.write(SAVING.replace("SECONDS", "100"))
    process = command.start()
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "heard SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == ("", "interrupted\n")
    assert not (command.folder / "saved").exists()


def test_a_closed_terminal_does_not_prevent_saving_the_state(command):
    """Printing to a closed terminal is an error."""
    command.write("""
        def main():
            interrupts.defer()
            Path("ready").touch()
            while interrupts.requested() is None:
                time.sleep(0.01)
            time.sleep(0.2)
            print("this goes nowhere", flush=True)
            Path("saved").write_text("state")
            sys.exit(128 + interrupts.requested())
    """)
    ours, its = pty.openpty()
    process = command.start(stdout=its, stderr=its)
    os.close(its)
    while not (command.folder / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    os.close(ours)
    assert process.wait(timeout=30) == 129
    assert (command.folder / "saved").exists()


def test_signals_that_the_parent_ignores_stay_ignored(command):
    """As with `nohup`, or in a script's background jobs."""
    command.write("def main():\n    ready()\n    time.sleep(0.5)\n    print('done')")
    script = 'trap "" HUP INT; exec "$@"'
    process = command.start(["sh", "-c", script, "sh", *command.words])
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert ends(process, 0)[0] == "done\n"


def test_a_forked_childs_signals_do_not_affect_the_parent(command):
    command.write("""
        def main():
            child = os.fork()
            if child == 0:
                ready()
                time.sleep(100)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
            time.sleep(0.2)
            print("the parent goes on")
    """)
    process = command.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("no list of a process's children on this system")
    os.kill(int(children.read_text(encoding="utf-8")), signal.SIGTERM)
    assert ends(process, 0)[0] == "the parent goes on\n"


def test_the_terminals_cursor_is_restored(command):
    command.write("""
        def main():
            from train.progress import RunProgress

            with RunProgress(100, 10):
                Path("ready").touch()
                time.sleep(100)
    """)
    command.environment |= {"TERM": "xterm"}
    ours, its = pty.openpty()
    process = command.start(stdout=its)
    while not (command.folder / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    shown = os.read(ours, 1 << 16).decode()
    assert [escape[-1] for escape in re.findall(r"\x1b\[\?25[hl]", shown)] == ["l", "h"]
    os.close(ours)
    os.close(its)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_ctrl_c_under_make_ends_both_and_starts_nothing_else(command):
    command.write("def main():\n    ready()\n    time.sleep(100)")
    (command.folder / "Makefile").write_text(f"demo:\n\t@{' '.join(command.words)}\n\t@touch next\n", encoding="utf-8")
    process = command.start(["make", "--no-print-directory", "demo"])  # `make test` may be running this
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not (command.folder / "next").exists()


REAL = {
    "train.main": ("--preset", "digits"),
    "train.evaluate": ("digits", "train", "none.safetensors"),
    "train.plot": ("run",),
    "convert": ("a.pth", "b.onnx"),
    "repvgg_jax": ("summary",),
    "examples.digits": ("run",),
}


PAUSE = """
import os, sys, time


class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == "tyro":
            os.write(1, b"ready\\n")
            time.sleep(100)


sys.meta_path.insert(0, Pause())
"""
"""Stops a process when it imports tyro, which every command does."""


@pytest.mark.parametrize("module", list(REAL))
def test_ctrl_c_during_the_imports_of_a_real_command(module, command):
    """Every command handles signals by the time its imports begin, and none prints a traceback."""
    (command.folder / "sitecustomize.py").write_text(PAUSE, encoding="utf-8")
    command.environment["PYTHONPATH"] += os.pathsep + str(command.folder)
    process = command.start([sys.executable, "-m", module, *REAL[module]])
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == ("", "interrupted\n")


def test_a_runs_loop_sees_a_signal_between_its_steps(command):
    command.write("""
        def main():
            from train.cluster import Preemption, stop_signal

            with Preemption() as preemption:
                for step in range(1, 10_000):
                    if preemption.asked(step):
                        break
                    if step == 3:
                        ready()
                    time.sleep(0.01)
            assert preemption.stopping()
            print("stopped", step < 9_999)
            sys.exit(128 + stop_signal())
    """)
    process = command.start()
    process.send_signal(signal.SIGINT)
    out, err = ends(process, 130)
    assert out == "stopped True\n"
    assert "SIGINT: saving the state after this step" in err


def test_a_signal_to_one_process_after_the_last_step_stops_all(monkeypatch):
    from train import cluster

    monkeypatch.setattr(cluster, "sum_over_processes", lambda heard: heard + 1)  # as if another process had
    assert cluster.Preemption().stopping()


def test_outside_a_command_signal_handlers_are_unchanged(command):
    """Even after training has asked about signals: only SIGTERM is handled there, and its handler is restored."""
    (command.folder / "command.py").write_text(
        textwrap.dedent("""
        import signal

        from train.cluster import Preemption

        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with Preemption() as preemption:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert not preemption.asked(1)
            signal.raise_signal(signal.SIGTERM)
            assert preemption.asked(2)
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        assert before == after == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]
        assert signal.set_wakeup_fd(-1) == -1
        print("ready", flush=True)
        """),
        encoding="utf-8",
    )
    ends(command.start(), 0)
