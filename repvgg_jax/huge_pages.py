"""Memory in huge pages: without them, page faults are a quarter of what a training step on a CPU takes.

XLA allocates a step's buffers anew each time, and the system hands them over page by page: 2 MB pages mean 500 times
fewer faults than 4 KB ones. glibc asks for them if its tunable `glibc.malloc.hugetlb` is 1, which it reads when a
process begins; so a process that finds it unset starts itself anew.
"""

import contextlib
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this process anew with huge pages, where glibc and the kernel have them and nobody has decided otherwise.

    It stays the same process to its parent: number, arguments, working directory, standard streams. To be called first,
    before there is anything to lose. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not available():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{TUNABLE}=1".lstrip(":")
    with contextlib.suppress(OSError):  # slower, but it works
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def available() -> bool:
    """Return whether asking changes anything: with glibc 2.35 or newer, and a kernel that gives them on request."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        numbers = tuple(map(int, version.split(".")[:2]))
        return name == "glibc" and numbers >= (2, 35) and "[madvise]" in _CHOICE.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # no Linux, or another libc
        return False
