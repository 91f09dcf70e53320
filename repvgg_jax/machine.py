"""This machine's processor, and the folder for what has been found out about it."""

import hashlib
import os
import platform
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/repvgg_jax/NAME`, or under `~/.cache`; not created."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "repvgg_jax" / name


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Model name, and a digest of the instruction sets: virtual machines share names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    sets = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("\n".join(sets).encode()).hexdigest()[:12]
    return f"{names[0] if names else platform.machine()} {digest}"
