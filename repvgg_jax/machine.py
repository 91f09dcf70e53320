"""Properties of this machine's processor, and the cache folder for what depends on it."""

import hashlib
import os
import platform
from pathlib import Path

from .processors import Processor, best_processor


def cache_folder(name: str) -> Path:
    """Return `$XDG_CACHE_HOME/repvgg_jax/NAME`, or the same under `~/.cache`, without creating it.

    Raises:
      OSError: the user has no home folder, for example because no account has the user's ID.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification says to ignore relative paths
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError("the user has no home folder") from error
    return base / "repvgg_jax" / name


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the processor's name and a digest of its instruction sets, since virtual machines share names."""
    lines = _cpuinfo()
    if not lines:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    sets = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("\n".join(sets).encode()).hexdigest()[:12]
    return f"{names[0] if names else platform.machine()} {digest}"


def processor_type() -> Processor | None:
    """Return the last type in `PROCESSORS` that this machine supports; None if there is none or this is not Linux."""
    features = [line.partition(":")[2].split() for line in _cpuinfo() if line.startswith(("flags", "Features"))]
    common = set(features[0]).intersection(*features) if features else ()
    return best_processor(platform.machine(), common)


def _cpuinfo() -> list[str]:
    """Return the lines of `/proc/cpuinfo`; none where it does not exist."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
