"""Claim: output that cannot be written gets one line on stderr; a reader that closes the pipe is not an error."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

FULL = "error: cannot write to stdout: No space left on device\n"

BODIES = {
    "a line": "print('{}')",
    "more than a buffer": "print('x' * 100_000)",
    "a line, flushed": "print('{}', flush=True)",
    "help": "import argparse; argparse.ArgumentParser().parse_args()",
    "a line, and status 0": "print('{}'); sys.exit(0)",
    "a run's progress": """
        from train.progress import RunProgress
        with RunProgress(10, 10) as progress:
            progress.note("an opening line")
            progress.note("another")
    """,
}


def write(folder: Path, body: str) -> None:
    """Write a command whose `main` is `body`."""
    (folder / "command.py").write_text(
        "if __name__ == '__main__':\n"
        "    from repvgg_jax.cli import run_module\n"
        "    run_module('command')\n"
        "import os, sys, time, warnings\n"
        "from repvgg_jax import errors, interrupts\n"
        "def main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n",
        encoding="utf-8",
    )


def run(folder: Path, body: str, *arguments: str, **options) -> subprocess.Popen:
    """Start a command whose `main` is `body`."""
    write(folder, body)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, "command.py", *arguments], cwd=folder, env=environment, text=True, **pipes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("body", list(BODIES))
def test_stdout_on_a_full_disk_is_one_line(body, tmp_path):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        process = run(tmp_path, BODIES[body], *(["--help"] if body == "help" else []), stdout=full)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, FULL)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_only_the_first_error_is_reported(tmp_path):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        process = run(tmp_path, "print('half an answer'); raise errors.DataError('no such image')", stdout=full)
        assert process.communicate(timeout=60)[1] == "error: no such image\n"
        assert process.returncode == 2
        process = run(tmp_path, "print('stopped'); sys.exit(143)", stdout=full)
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 143
        process = run(tmp_path, "raise errors.DataError('no such image')", stderr=full)
        process.communicate(timeout=60)
        assert process.returncode == 2, "a full stderr changes nothing"


@pytest.mark.parametrize("body", list(BODIES))
def test_a_reader_that_closes_the_pipe_is_not_an_error(body, tmp_path):
    slow = "time.sleep(0.3)\n" + textwrap.dedent(BODIES[body])
    process = run(tmp_path, slow, *(["--help"] if body == "help" else []))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_printing_to_a_closed_stdout_is_not_an_error(tmp_path):
    write(tmp_path, textwrap.dedent(BODIES["a run's progress"]) + "print('{}')")
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} command.py >&-"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_that_also_ends_tee_still_lets_a_run_save_its_state(tmp_path):
    process = run(
        tmp_path,
        """
        from train.progress import RunProgress
        with RunProgress(10, 10) as progress:
            interrupts.defer()
            progress.note("an opening line")
            while interrupts.requested() is None:
                progress.note("a row of metrics")
                time.sleep(0.01)
            progress.note("stopped, state saved")
            open("saved", "w").close()
            sys.exit(128 + interrupts.requested())
        """,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("MemoryError", "error: out of memory (no details); use smaller images or a smaller batch\n"),
        (
            "__import__('numpy').zeros((1 << 40, 1 << 12), 'u1')",
            "error: out of memory (Unable to allocate 4.00 PiB for an array with shape (1099511627776, 4096) and data "
            "type uint8); use smaller images or a smaller batch\n",
        ),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')",
            "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); use smaller images or a "
            "smaller batch\n",
        ),
    ],
)
def test_out_of_memory_is_one_line(raised, says, tmp_path):
    process = run(tmp_path, f"raise {raised}")
    assert process.communicate(timeout=60) == ("", says)
    assert process.returncode == 2


def test_a_bug_of_ours_keeps_its_traceback(tmp_path):
    for raised in ("OSError(5, 'input/output error')", "RuntimeError('x')", "ModuleNotFoundError('x', name='x')"):
        process = run(tmp_path, f"raise {raised}")
        assert "Traceback" in process.communicate(timeout=60)[1]
        assert process.returncode == 1


REAL = [("repvgg_jax", "summary", "RepVGG-A0"), ("train.plot", "--help")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", REAL, ids=" ".join)
def test_real_commands_report_it_too(words, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, FULL)


def test_ctrl_c_while_the_interpreter_exits_changes_nothing(tmp_path):
    """Python restores the default signal handlers before it unloads modules, and unloading JAX takes a while."""
    body = """
        class Late:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                os.write(1, b"after it\\n")
        import signal
        sys.modules["late"] = Late()
        print("result", flush=True)
    """
    process = run(tmp_path, body.replace("os.", "posix.").replace("import signal", "import posix, signal"))
    assert process.communicate(timeout=60) == ("result\nafter it\n", "")
    assert process.returncode == 0


def test_a_later_failure_for_the_same_reason_is_not_reported_again(tmp_path):
    body = """
        import asyncio
        async def write():
            raise OSError("File too large")
        async def begin():
            global task
            task = asyncio.create_task(write())
            await asyncio.sleep(0)
        asyncio.run(begin())
        raise errors.RepVGGError("cannot write the checkpoint: File too large")
    """
    process = run(tmp_path, body)
    assert process.communicate(timeout=60) == ("", "error: cannot write the checkpoint: File too large\n")
    assert process.returncode == 2
