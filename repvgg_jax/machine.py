"""This machine's processor, and the folder for what has been found out about it."""

import hashlib
import os
import platform
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return `$XDG_CACHE_HOME/repvgg_jax/NAME`, or the same under `~/.cache`; creates nothing.

    Raises:
      OSError: the user has no home folder, as under a number that no account has.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification: what is relative is to be ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError("the user has no home folder") from error
    return base / "repvgg_jax" / name


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the processor's name, and a digest of the instruction sets: virtual machines share names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    sets = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("\n".join(sets).encode()).hexdigest()[:12]
    return f"{names[0] if names else platform.machine()} {digest}"
