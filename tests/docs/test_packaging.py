"""Claim: the wheel is the library alone, and enough for an installed user to load, fuse, predict and summarise."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.slow


USE = """
import json
import sys

import numpy as np
import repvgg_jax as rv

model, variables = rv.load_weights(sys.argv[1])
fused = rv.to_deploy(model, variables)
logits = rv.make_predictor(*fused, batch_size=2, image_size=64)(np.load(sys.argv[2]))
np.save(sys.argv[3], logits)
rv.export_stablehlo(sys.argv[4], *fused, image_size=64)
print(json.dumps([rv.__file__, sorted({name.split(".")[0] for name in sys.modules})]))
"""
"""An installed user's script."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files that git tracks or would track."""
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """A folder with wheel and source distribution."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, source], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def compiled(source, tmp_path_factory) -> Path:
    """A folder with a wheel that has compiled convolutions, as `make wheel` builds it."""
    if platform.machine() != "x86_64" or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler for x86-64")
    out, plain = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("plain")
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        plain,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True, env=os.environ | {"REPVGG_JAX_COMPILE_WHEEL": "x86_64"})
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    repair = [sys.executable, "-m", "auditwheel", "repair", only(plain, "*.whl"), "--wheel-dir", out]
    subprocess.run(repair, check=True, capture_output=True, env=os.environ | {"PATH": tools})
    return out


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_twine_accepts_the_distributions(built):
    check = [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_holds_the_library_alone(built):
    names = zipfile.ZipFile(only(built, "*.whl")).namelist()
    assert {name.split("/")[0] for name in names} == {"repvgg_jax", f"repvgg_jax-{rv.__version__}.dist-info"}
    assert "repvgg_jax/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    for suffix in ("py", "cc", "h", "txt", "css"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "repvgg_jax").rglob(f"*.{suffix}")}
        assert sources
        assert sources <= set(names)


def test_the_source_distribution_holds_the_whole_checkout(built):
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("train/main.py", "convert/__main__.py", "tests/conftest.py", "Makefile", "constraints.txt", "LICENSE"):
        assert name in names


def test_an_environment_with_the_wheel_alone_loads_fuses_and_predicts(built, tmp_path):
    model = rv.create_model("RepVGG-A0", num_classes=5)
    variables = random_variables(model)
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    np.save(tmp_path / "images.npy", images)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, only(built, "*.whl")], check=True, timeout=500)

    use = [python, "-c", USE, "w.safetensors", "images.npy", "logits.npy", "net.stablehlo"]
    done = subprocess.run(use, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    origin, loaded = json.loads(done.stdout.splitlines()[-1])
    assert Path(origin).is_relative_to(tmp_path / "venv")
    assert not {"torch", "tensorflow", "onnx", "onnxruntime", "train", "convert"} & set(loaded)
    expected = jax.jit(model.apply)(variables, images)
    assert relative_difference(expected, np.load(tmp_path / "logits.npy")) <= 1e-5
    summary = subprocess.run([python, "-m", "repvgg_jax", "summary", "RepVGG-A0"], capture_output=True, text=True)
    assert "RepVGG-A0" in summary.stdout, summary.stderr


def test_the_compiled_wheel_is_for_any_python_on_many_linuxes(compiled):
    wheel = only(compiled, "*.whl")
    assert "-py3-none-manylinux_2_" in wheel.name
    assert wheel.name.endswith("_x86_64.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert len(libraries) == 4
    for check in (["twine", "check", "--strict", wheel], ["auditwheel", "show", wheel]):
        done = subprocess.run([sys.executable, "-m", *check], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


PLAN = """
import repvgg_jax as rv

print(rv.make_predictor(*rv.load_weights("w.safetensors"), batch_size=1, image_size=64).plan)
print(rv.__file__)
"""


def test_it_runs_native_convolutions_where_there_is_no_compiler(compiled, tmp_path):
    """The wheel alone is installed; its dependencies are this environment's."""
    model = rv.create_model("RepVGG-A0", num_classes=5, deploy=True)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "installed"]
    subprocess.run([*pip, only(compiled, "*.whl")], check=True, capture_output=True)
    nowhere = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", PLAN], cwd=tmp_path, capture_output=True, text=True, env=nowhere)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "installed") in done.stdout.splitlines()[-1]
    assert "native" in done.stdout
    assert not list((tmp_path / ".cache").rglob("*.so"))


def test_importing_the_library_imports_no_optional_library():
    """In this environment, where all optional libraries are installed."""
    script = "import sys, repvgg_jax; print({name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("torch", "tensorflow", "onnx", "onnxruntime", "openvino", "sklearn", "huggingface_hub"):
        assert f"'{name}'" not in done.stdout
