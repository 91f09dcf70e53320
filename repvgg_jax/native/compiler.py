"""C++ sources compiled for this machine the first time they are needed, as `torch.compile` does it on a CPU.

The library lies in the user's cache folder, named by a digest of what it depends on; so does the compiler's message
where it failed, so that no process tries in vain again. `REPVGG_JAX_NATIVE=0` in the environment asks for none.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib.version

from ..errors import RepVGGError
from ..files import atomic_path
from ..machine import cache_folder, cpu_model

SWITCH = "REPVGG_JAX_NATIVE"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 300

_FOR_THIS_CPU = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_log = logging.getLogger(__name__)


def switched_on() -> bool:
    """Whether the environment allows native code."""
    return os.environ.get(SWITCH, "1") != "0"


def load(source: Path, purpose: str, *options: str) -> ctypes.CDLL | None:
    """The library made of a source file and the headers beside it.

    Args:
      source: C++17.
      purpose: what it is for, in the plural, for the log.
      options: of the compiler.

    Returns:
      None where there is no compiler for this machine, or it fails, which the log tells once.
    """
    path = compiled(source, purpose, *options)
    if path is None:
        return None
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        _log.warning("no native %s: cannot load %s (%s)", purpose, path, error)
        return None


def compiled(source: Path, purpose: str, *options: str) -> Path | None:
    """The file that `load` loads."""
    flag = _FOR_THIS_CPU.get(platform.machine())
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, COMPILERS)), None)
    if flag is None or compiler is None or sys.platform == "win32":
        return None
    command = [compiler, "-std=c++17", "-O3", flag, "-fPIC", "-shared", *options]
    texts = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    installed = f"{Path(compiler).stat().st_mtime_ns}"  # another one may succeed where this one fails
    dependencies = (*texts, *command, installed, jaxlib.version.__version__, cpu_model())
    digest = hashlib.sha256("\n".join(dependencies).encode()).hexdigest()[:24]
    path = cache_folder("native") / f"{digest}.so"
    failure = path.with_suffix(".failed")
    if path.exists() or failure.exists():
        return path if path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            message = _compile([*command, os.fspath(source), "-o", f"{temporary}"])
            if message:
                raise RepVGGError(message)
    except (OSError, RepVGGError) as error:
        _log.warning("no native %s: %s", purpose, str(error).splitlines()[0])
        _keep(failure, str(error))
        return None
    return path


def _compile(command: list[str]) -> str:
    """What went wrong; empty if nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took longer than {COMPILE_SECONDS} s"
    return "" if done.returncode == 0 else f"{command[0]} failed\n{done.stderr}"


def _keep(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # nothing can be kept here: the next process tries again
        path.write_text(text)
