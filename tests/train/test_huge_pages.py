"""Claim: `python -m train.main` gets its memory in huge pages if the system has them, whoever starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_jax import huge_pages
from tests.helpers.repository import ROOT

needs_huge_pages = pytest.mark.skipif(
    not huge_pages.available(), reason="needs glibc 2.35 and transparent huge pages on request (madvise)"
)

SHOW = """
import os, sys
from repvgg_jax.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
block = b"x" * (64 * 2**20)
huge = [line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), int(huge[0]) >= 32 * 2**10, sys.argv[1:], sys.stdin.read())
"""


def environment(tunables: str | None = None, *paths: Path) -> dict[str, str]:
    """Return variables for a process with these glibc tunables, and folders to import from before the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, ROOT]))
    return variables if tunables is None else variables | {"GLIBC_TUNABLES": tunables}


def started(*arguments: str, tunables: str | None = None) -> tuple[int, list[str]]:
    """Return the process id, and the words that the program prints."""
    words, pipe = [sys.executable, *arguments], subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment(tunables))
    output, _ = process.communicate("input")
    assert process.returncode == 0
    return process.pid, output.split()


@needs_huge_pages
def test_the_restart_keeps_process_arguments_and_input(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW, encoding="utf-8")
    for how in (["-c", SHOW], ["-X", "utf8", str(tmp_path / "show.py")]):
        pid, printed = started(*how, "a", "b")
        assert printed == [str(pid), "glibc.malloc.hugetlb=1", "True", "['a',", "'b']", "input"]


@needs_huge_pages
@pytest.mark.parametrize(
    ("tunables", "becomes", "huge"),
    [
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", "False"),
        ("glibc.malloc.perturb=5", "glibc.malloc.perturb=5:glibc.malloc.hugetlb=1", "True"),
    ],
)
def test_the_users_tunables_are_kept(tunables: str, becomes: str, huge: str) -> None:
    _, printed = started("-c", SHOW, tunables=tunables)
    assert printed[1:3] == [becomes, huge]


@needs_huge_pages
def test_training_restarts_with_huge_pages(tmp_path: Path) -> None:
    """JAX is not imported before the restart, so the first start costs no more than Python itself."""
    spy = "import sys, os; os.execv = lambda path, words: print(words[1:], 'jax' in sys.modules) or sys.exit(0)"
    (tmp_path / "sitecustomize.py").write_text(spy, encoding="utf-8")
    words = ["-m", "train.main", "--preset", "digits"]
    done = subprocess.run([sys.executable, *words], env=environment(None, tmp_path), capture_output=True, text=True)
    assert done.stdout.strip() == f"{words} False", done.stderr


def test_systems_without_huge_pages_do_not_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("restarted"))
    for version in ("musl 1.2", "glibc 2.34", ""):
        monkeypatch.setattr(os, "confstr", lambda _, version=version: version)
        huge_pages.restart_with_huge_pages()
    monkeypatch.delattr(os, "confstr")
    huge_pages.restart_with_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ
