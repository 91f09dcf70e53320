"""The kinds of processor that a wheel holds compiled code for, and the compiler's options.

`setup.py` reads this file by its path, before the package is there: it imports the standard library alone.
"""

import dataclasses
import platform
from collections.abc import Collection
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Processor:
    """One kind of processor.

    Attributes:
      name: part of the library's file name.
      machine: as `platform.machine` has it.
      options: of GCC and Clang.
      features: the names that `/proc/cpuinfo` must list; compilers imply the older ones.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    features: frozenset[str]


_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI, _BF16 = "-mavx512vnni", "-mavx512bf16"
_AMX = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")  # used only where the operating system allows it

PROCESSORS = (
    Processor("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    Processor("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _V4),
    Processor("x86-64-v4-vnni", "x86_64", ("-march=x86-64-v4", _VNNI), _V4 | {"avx512_vnni"}),
    Processor(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", _VNNI, _BF16, *_AMX),
        _V4 | {"avx512_vnni", "avx512_bf16"},
    ),
    Processor("armv8-a", "aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
)
"""The later ones of a machine can do all that the earlier ones can."""


COMPILE = ("-std=c++17", "-O3", "-fPIC", "-shared")
"""Options for every library."""
CONVOLUTIONS = ("-ffp-contract=fast", "-pthread", "-isystem")
"""Those of `conv/native/conv3x3.cc`; the folder of XLA's headers follows."""


def best_processor(machine: str, features: Collection[str]) -> Processor | None:
    """Return the last kind that a machine with these features has; None if it has none."""
    usable = [one for one in PROCESSORS if one.machine == machine and one.features <= set(features)]
    return usable[-1] if usable else None


def this_processor() -> Processor | None:
    """Return the last kind that this machine has; None if it has none, or if that cannot be read (not Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    features = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    # Those that all cores have.
    common = set(features[0]).intersection(*features) if features else ()
    return best_processor(platform.machine(), common)


def compiled_file(source: Path, processor: Processor) -> Path:
    """Return where a wheel has the library that a source file was compiled to."""
    return source.parent / "compiled" / f"{source.stem}-{processor.name}.so"
