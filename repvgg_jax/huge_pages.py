"""Memory in huge pages: without them, page faults take a quarter of the time of a training step on a CPU.

XLA allocates the buffers anew for each step, and the system maps them page by page. 2 MB pages cause 500 times fewer
faults than 4 KB pages. glibc requests huge pages if its tunable `glibc.malloc.hugetlb` is 1. It reads the tunable only
when a process starts, so if the tunable is not set, the process restarts itself.
"""

import contextlib
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restart this process with huge pages, if glibc and the kernel support them and the tunable is not set.

    The PID, arguments, working directory and standard streams stay the same. Call this first, while there is no state
    to lose. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not available():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{TUNABLE}=1".lstrip(":")
    with contextlib.suppress(OSError):  # continue with small pages
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def available() -> bool:
    """Return whether the tunable has an effect: glibc is 2.35 or newer, and the kernel grants huge pages on request."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        numbers = tuple(map(int, version.split(".")[:2]))
        return name == "glibc" and numbers >= (2, 35) and "[madvise]" in _CHOICE.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # not Linux, or another libc
        return False
