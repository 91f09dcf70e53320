"""Claim: the locale's text encoding has no effect: every text file of ours is read and written as UTF-8."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.photos import write_photos
from tests.helpers.repository import ROOT

LOCALES = {
    "zh_CN.GBK": ("zh_CN", "GBK"),
    "ja_JP.EUC-JP": ("ja_JP", "EUC-JP"),
    "de_DE.ISO-8859-1": ("de_DE", "ISO-8859-1"),
}


def sources() -> list[Path]:
    folders = ("repvgg_jax", "train", "convert", "examples", "benchmarks", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def text_calls(path: Path) -> Iterator[ast.Call]:
    """Yield the calls that read or write a file as text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        arguments = [ast.unparse(value) for value in (*node.args, *(keyword.value for keyword in node.keywords))]
        is_binary = any(re.fullmatch("'[rwxab+]*b[rwxab+]*'", argument) for argument in arguments)
        opens = name in ("open", "fdopen") and owner not in ("Image", "tarfile", "zipfile", "os", "webbrowser", "hub")
        has_encoding = name == "read_text" and bool(node.args)  # it is the first argument
        if not has_encoding and (name in ("read_text", "write_text") or (opens and not is_binary)):
            yield node


def test_every_text_file_is_opened_with_its_encoding():
    """Stricter than ruff's PLW1514, which sees only what it can infer to be a path."""
    assert len(sources()) > 100
    calls = [(path, call) for path in sources() for call in text_calls(path)]
    assert len(calls) > 30
    missing = [f"{p.relative_to(ROOT)}:{c.lineno}" for p, c in calls if "encoding" not in {k.arg for k in c.keywords}]
    assert missing == []


@pytest.fixture(scope="module")
def locpath(tmp_path_factory) -> Path:
    """Locales compiled for this test, since most systems have only UTF-8 ones."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef (in the Debian package libc-bin)")
    for name, (language, charset) in LOCALES.items():
        command = ["localedef", "--no-archive", "-i", language, "-f", charset, folder / name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"localedef cannot make {name} (its sources are in the Debian package locales): {done.stderr}")
    return folder


@pytest.mark.slow
def test_predictors_and_native_code_work(locpath, tmp_path):
    walk("short", "zh_CN.GBK", locpath, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOCALES, "C"])
def test_training_evaluation_conversion_and_prediction_work(name, locpath, tmp_path):
    walk("whole", name, locpath, tmp_path)


def walk(length: str, name: str, locpath: Path, tmp_path: Path) -> None:
    """Run `locale_walk.py` under a locale, in a folder with photographs."""
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 4, offset=20)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment |= {"LOCPATH": str(locpath), "LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands.locale_walk", length], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    *_, first, second, last = done.stdout.decode("ascii").splitlines()
    result = json.loads(last)
    assert result["encoding"] == {"C": "ANSI_X3.4-1968"}.get(name, name.partition(".")[2])
    assert result["seven"] in (7, "no compiler")
    assert result["classes"] == ["garden", "pagoda"]
    assert first.startswith("photos/val/garden/000.jpg: ")
    assert second.startswith("photos/val/garden/002.jpg: ")
