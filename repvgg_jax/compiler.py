"""Compilation of C++ sources for this machine on first use, as `torch.compile` does on a CPU.

The library is kept in the user's cache folder. Its file name is a digest of everything it depends on. If the compiler
rejects the source, the message is kept there for a day, so that other processes do not try again. Since a library is
code, it is loaded only from a folder that nobody else can write to (`ownership.py`). If the cache is not such a folder,
the library is compiled into a temporary one. `REPVGG_JAX_NATIVE=0` in the environment turns native code off.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jaxlib.version

from .errors import RepVGGError
from .files import atomic_path, scratch_folder
from .machine import cache_folder, cpu_model, processor_type
from .ownership import check_own_file, find_private_folder, make_private_folder
from .processors import COMPILE, compiled_file

SWITCH = "REPVGG_JAX_NATIVE"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 300
FAILURE_SECONDS = 24 * 3600
"""Time in seconds before a rejected source is compiled again."""

_FOR_THIS_CPU = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_PASSING_TROUBLE = (
    *("no space left", "quota exceeded", "read-only file system", "input/output error", "write error", "stale file"),
    *("cannot allocate memory", "out of memory", "memory exhausted", "bad_alloc", "too many open files"),
    *("temporarily unavailable", "permission denied", "text file busy"),
    *("signal", "killed", "internal compiler error"),
)
"""Parts of messages of compilers, assemblers and linkers, in lower case, that indicate a problem of the machine and not
of the source."""

_log = logging.getLogger(__name__)


def switched_on() -> bool:
    """Return whether the environment allows native code."""
    return os.environ.get(SWITCH, "1") != "0"


def load_compiled(source: Path) -> ctypes.CDLL | None:
    """Return the wheel's library for this processor, or None if there is none or it cannot be loaded."""
    processor = processor_type()
    library = compiled_file(source, processor) if processor else None
    if library is None or not library.exists():
        return None
    try:
        return ctypes.CDLL(os.fspath(library))
    except OSError as error:  # for example, the C library is too old
        _log.warning("cannot load the wheel's compiled library: %s", error)
        return None


def load_library(source: Path, purpose: str, *options: str) -> ctypes.CDLL | None:
    """Return the library compiled from a source file and the headers next to it.

    Args:
      source: C++17 source file.
      purpose: plural noun for the log, such as "convolutions".
      *options: additional compiler options.

    Returns:
      The library. None if there is no compiler for this machine or if it fails. Failures are logged.
    """
    command = _command(options)
    if command is None:
        return None
    try:
        name = _digest(source, command)
        with _folder(purpose, f"{name}.so") as folder:
            library, rejected = folder / f"{name}.so", folder / f"{name}.failed"
            is_old = _is_own(library)
            if not is_old:
                if _is_recent(rejected):
                    _log.info(
                        "no native %s: the compiler rejected the source less than a day ago, see %s", purpose, rejected
                    )
                    return None
                _compile(command, source, library, rejected)
            try:
                return ctypes.CDLL(os.fspath(library))
            except OSError:
                if not is_old:
                    raise
                _compile(command, source, library, rejected)  # the cached file is damaged
                return ctypes.CDLL(os.fspath(library))
    except (OSError, RepVGGError) as error:
        _log.warning("no native %s: %s", purpose, str(error).splitlines()[0])
        return None


def _command(options: tuple[str, ...]) -> list[str] | None:
    """Return the compiler and its options, without file names; None if there is no compiler for this machine."""
    flag = _FOR_THIS_CPU.get(platform.machine())
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, COMPILERS)), None)
    if flag is None or compiler is None or sys.platform == "win32":
        return None
    return [compiler, *COMPILE, flag, *options]


def _digest(source: Path, command: list[str]) -> str:
    """Return a digest of everything that the compiler's output depends on."""
    texts = (path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h"))))
    installed = f"{Path(command[0]).stat().st_mtime_ns}"  # another version may succeed where this one fails
    dependencies = (*texts, *command, installed, jaxlib.version.__version__, cpu_model())
    return hashlib.sha256("\n".join(dependencies).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _folder(purpose: str, library: str) -> Iterator[Path]:
    """Yield the cache folder, or a temporary one if the cache cannot be used or others could put libraries into it.

    Raises:
      OSError: neither folder can be used.
    """
    try:
        folder = make_private_folder(cache_folder("native"))
        if not os.access(folder, os.W_OK | os.X_OK) and not (folder / library).exists():
            raise PermissionError(f"{folder} cannot be written to")
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise PermissionError(f"{folder} is on a file system mounted with noexec")
    except OSError as error:
        _log.warning("native %s are compiled for this process alone, in a temporary folder: %s", purpose, error)
    else:
        yield folder
        return
    # The file may be deleted once the library is loaded.
    with scratch_folder("repvgg_jax-", tempfile.gettempdir()) as temporary:
        yield find_private_folder(temporary)


def _is_own(library: Path) -> bool:
    """Return whether the library exists and belongs to the user. Remove it if it exists but fails the check."""
    try:
        check_own_file(library)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("compiling again instead of using the cached library: %s", error)
        library.unlink()
        return False
    return True


def _is_recent(rejected: Path) -> bool:
    """Return whether a rejection by the compiler is recorded and has not expired."""
    with contextlib.suppress(OSError):
        check_own_file(rejected)
        return 0 <= time.time() - rejected.stat().st_mtime < FAILURE_SECONDS
    return False


def _compile(command: list[str], source: Path, library: Path, rejected: Path) -> None:
    """Write the library, or the compiler's message if it rejects the source.

    Raises:
      RepVGGError: the compiler failed.
    """
    with atomic_path(library, mode=0o700) as temporary:
        status, message = _run([*command, os.fspath(source), "-o", f"{temporary}"])
        if status != 0 and _blames_source(status, message):
            with contextlib.suppress(OSError, RepVGGError), atomic_path(rejected, mode=0o600) as mark:
                mark.write_text(message, encoding="utf-8")
        if status != 0:
            reason = "failed" if status > 0 else f"was ended by signal {-status}"
            raise RepVGGError(f"{command[0]} {reason}\n{message}")
    rejected.unlink(missing_ok=True)


def _blames_source(status: int, message: str) -> bool:
    """Return whether a compiler failed because of the source or the options, and so will fail again."""
    # Shells return 126 or 127 for a program that cannot be run, and 128 or more for one that was ended by a signal.
    return 0 < status < 126 and bool(message.strip()) and not any(t in message.lower() for t in _PASSING_TROUBLE)


def _run(command: list[str]) -> tuple[int, str]:
    """Return the compiler's exit status (negative if a signal ended it) and its messages, in English.

    Raises:
      RepVGGError: the compiler takes too long.
    """
    environment = os.environ | {"LC_ALL": "C"}
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=nothing, stdout=nothing, stderr=pipe, process_group=0
    ) as process:
        try:
            _, message = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException as error:
            # Kill the whole group: the driver's children do the work, and hold the pipe that `communicate` reads.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # `Popen` does not wait after Ctrl-C
            if isinstance(error, subprocess.TimeoutExpired):
                raise RepVGGError(f"{command[0]} took longer than {COMPILE_SECONDS} s") from None
            raise
    return process.returncode, message.decode(errors="replace")
