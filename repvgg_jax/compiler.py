"""C++ sources compiled for this machine the first time they are needed, as `torch.compile` does it on a CPU.

The library lies in the user's cache folder, named by a digest of what it depends on. So does the compiler's message
where it rejected the source, for a day, so that not every process tries in vain. A library is code: it is loaded only
from where nobody else can have put it (`ownership.py`), and compiled into a temporary folder where there is no such
place. `REPVGG_JAX_NATIVE=0` in the environment asks for none.
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
from .machine import cache_folder, cpu_model
from .ownership import check_own_file, find_private_folder, make_private_folder
from .processors import COMPILE, compiled_file, this_processor

SWITCH = "REPVGG_JAX_NATIVE"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 300
FAILURE_SECONDS = 24 * 3600
"""How long a rejected source is not tried again."""

_FOR_THIS_CPU = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_PASSING_TROUBLE = (
    *("no space left", "quota exceeded", "read-only file system", "input/output error", "write error", "stale file"),
    *("cannot allocate memory", "out of memory", "memory exhausted", "bad_alloc", "too many open files"),
    *("temporarily unavailable", "permission denied", "text file busy"),
    *("signal", "killed", "internal compiler error"),
)
"""What compilers, assemblers and linkers say, in lower case, of a machine in trouble and not of the source."""

_log = logging.getLogger(__name__)


def switched_on() -> bool:
    """Whether the environment allows native code."""
    return os.environ.get(SWITCH, "1") != "0"


def load_compiled(source: Path) -> ctypes.CDLL | None:
    """Return the library that a wheel brought for this processor; None if it brought none that can be loaded."""
    processor = this_processor()
    library = compiled_file(source, processor) if processor else None
    if library is None or not library.exists():
        return None
    try:
        return ctypes.CDLL(os.fspath(library))
    except OSError as error:  # such as a C library that is too old
        _log.warning("the compiled library of the wheel is not used: %s", error)
        return None


def load_library(source: Path, purpose: str, *options: str) -> ctypes.CDLL | None:
    """Return the library made of a source file and the headers beside it.

    Args:
      source: C++17.
      purpose: what it is for, in the plural, for the log.
      options: of the compiler.

    Returns:
      None where there is no compiler for this machine, or it fails, which the log says.
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
                        "no native %s: the compiler rejected the source less than a day ago, %s", purpose, rejected
                    )
                    return None
                _compile(command, source, library, rejected)
            try:
                return ctypes.CDLL(os.fspath(library))
            except OSError:
                if not is_old:
                    raise
                _compile(command, source, library, rejected)  # it has been damaged since
                return ctypes.CDLL(os.fspath(library))
    except (OSError, RepVGGError) as error:
        _log.warning("no native %s: %s", purpose, str(error).splitlines()[0])
        return None


def _command(options: tuple[str, ...]) -> list[str] | None:
    """Return the compiler and its options, without files; None where there is none for this machine."""
    flag = _FOR_THIS_CPU.get(platform.machine())
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, COMPILERS)), None)
    if flag is None or compiler is None or sys.platform == "win32":
        return None
    return [compiler, *COMPILE, flag, *options]


def _digest(source: Path, command: list[str]) -> str:
    """Return a name for what comes out of the compiler."""
    texts = (path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h"))))
    installed = f"{Path(command[0]).stat().st_mtime_ns}"  # another one may succeed where this one fails
    dependencies = (*texts, *command, installed, jaxlib.version.__version__, cpu_model())
    return hashlib.sha256("\n".join(dependencies).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _folder(purpose: str, library: str) -> Iterator[Path]:
    """Yield the cache, or a temporary folder where that cannot be used or where others could put libraries into it.

    Raises:
      OSError: neither can be used.
    """
    try:
        folder = make_private_folder(cache_folder("native"))
        if not os.access(folder, os.W_OK | os.X_OK) and not (folder / library).exists():
            raise PermissionError(f"{folder} cannot be written to")
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise PermissionError(f"{folder} is on a file system that runs no programs")
    except OSError as error:
        _log.warning("native %s are compiled for this process alone, in a temporary folder: %s", purpose, error)
    else:
        yield folder
        return
    # A loaded library needs its file no longer.
    with scratch_folder("repvgg_jax-", tempfile.gettempdir()) as temporary:
        yield find_private_folder(temporary)


def _is_own(library: Path) -> bool:
    """Return whether the library is there and the user's own; anything else of its name is cleared away."""
    try:
        check_own_file(library)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("not loaded, but compiled again: %s", error)
        library.unlink()
        return False
    return True


def _is_recent(rejected: Path) -> bool:
    """Whether a compiler's message is there that still counts."""
    with contextlib.suppress(OSError):
        check_own_file(rejected)
        return 0 <= time.time() - rejected.stat().st_mtime < FAILURE_SECONDS
    return False


def _compile(command: list[str], source: Path, library: Path, rejected: Path) -> None:
    """Write the library, or what the compiler has against the source.

    Raises:
      RepVGGError: there is no library: the compiler rejected the source, or something else went wrong.
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
    """Whether a compiler's failure is its verdict on the source or the options, which will be the same next time."""
    # A shell reports a program that cannot be run as 126 or 127, and one that a signal ended as 128 and more.
    return 0 < status < 126 and bool(message.strip()) and not any(t in message.lower() for t in _PASSING_TROUBLE)


def _run(command: list[str]) -> tuple[int, str]:
    """Return the compiler's exit status (negative: the signal that ended it) and its messages, in English.

    Raises:
      RepVGGError: it takes too long.
    """
    environment = os.environ | {"LC_ALL": "C"}
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=nothing, stdout=nothing, stderr=pipe, process_group=0
    ) as process:
        try:
            _, message = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException as error:
            # All of its group: the driver's children do the work, and hold the pipe that `communicate` reads.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # which `Popen` leaves out after Ctrl-C
            if isinstance(error, subprocess.TimeoutExpired):
                raise RepVGGError(f"{command[0]} took longer than {COMPILE_SECONDS} s") from None
            raise
    return process.returncode, message.decode(errors="replace")
