"""Claim: an editable install provides commands that work from any folder."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=32)


def write_command(folder: Path, name: str) -> Path:
    """Write the script that pip would write for an entry of `project.scripts`."""
    module, function = COMMANDS[name].split(":")
    path = folder / name
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n", encoding="utf-8")
    return path


def run(folder: Path, site: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command in a folder outside the checkout, where only `site` has the library."""
    command = [sys.executable, str(write_command(folder, name)), *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )


@pytest.fixture
def editable(tmp_path) -> Path:
    """Everything that an editable install makes importable: the library alone."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "repvgg_jax").symlink_to(ROOT / "repvgg_jax")
    # Unrelated packages with the same names.
    for name in ("train", "convert"):
        (tmp_path / "site" / name).mkdir()
        (tmp_path / "site" / name / "__init__.py").write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    return tmp_path / "site"


def test_convert_works_outside_the_checkout(editable, tmp_path):
    model = rv.create_model(SMALL, 2)
    rv.save_weights(tmp_path / "train.safetensors", model, random_variables(model))
    done = run(tmp_path, editable, "repvgg-convert", "train.safetensors", "deploy.safetensors")
    assert done.returncode == 0, done.stderr
    assert rv.inspect_weights(tmp_path / "deploy.safetensors").deploy
    done = run(tmp_path, editable, "repvgg-convert", "none.safetensors", "deploy.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("repvgg", ("summary", "RepVGG-A0"), "RepVGG-A0"),
        ("repvgg-train", ("--help",), "--preset"),
        ("repvgg-evaluate", ("--help",), "--resolution"),
    ],
)
def test_the_other_commands_work_there_too(name, arguments, words, editable, tmp_path):
    done = run(tmp_path, editable, name, *arguments)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_without_a_checkout_commands_say_that_they_need_one(monkeypatch, tmp_path, capsys):
    """As when installed from the wheel."""
    from repvgg_jax import console, interrupts

    monkeypatch.setattr(interrupts, "watch", lambda: None)  # it would last until this process ends
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # otherwise the command would re-exec this process
    monkeypatch.setattr(console, "__file__", str(tmp_path / "site-packages" / "repvgg_jax" / "console.py"))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/repvgg-train"])
    for command in (console.train, console.evaluate, console.convert):
        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 3
    assert "error: repvgg-train runs python -m train.main of a checkout, and this installation has none" in err


@pytest.mark.slow
def test_pip_installs_every_command(tmp_path):
    """A real editable install of a copy, into an environment that sees this one's libraries."""
    pytest.importorskip("setuptools", minversion="77", reason="an offline build needs setuptools in this environment")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages,) = (path for path in map(Path, sys.path) if path.name == "site-packages")
    (site / "libraries.pth").write_text(f"{packages}\n", encoding="utf-8")
    scripts = tmp_path / "venv" / "bin"
    # An old setuptools that comes with pip would shadow the one in the libraries' folder.
    subprocess.run([scripts / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    install = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable"]
    subprocess.run([*install, tmp_path / "checkout"], check=True)
    for name in COMMANDS:
        done = subprocess.run([scripts / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
