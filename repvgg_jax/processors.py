"""Processor types that a wheel contains compiled code for, and the compiler options.

`setup.py` loads this file by path before the package is installed, so it imports only the standard library.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Processor:
    """A processor type.

    Attributes:
      name: part of the library's file name.
      machine: value of `platform.machine()`.
      options: options of GCC and Clang.
      features: names that `/proc/cpuinfo` must list. Older features that the compiler options imply are omitted.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    features: frozenset[str]


_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512 = ("-march=x86-64-v4", "-mtune=icelake-server")  # GCC 12's default tuning makes INT8 a tenth slower
_VNNI, _BF16 = "-mavx512vnni", "-mavx512bf16"
_AMX = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")  # used only where the operating system allows it

PROCESSORS = (
    Processor("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    Processor("x86-64-v4", "x86_64", _AVX512, _V4),
    Processor("x86-64-v4-vnni", "x86_64", (*_AVX512, _VNNI), _V4 | {"avx512_vnni"}),
    Processor(
        "x86-64-v4-bf16",
        "x86_64",
        (*_AVX512, _VNNI, _BF16, *_AMX),
        _V4 | {"avx512_vnni", "avx512_bf16"},
    ),
    Processor("armv8-a", "aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
)
"""Processor types in ascending order: for the same machine, later ones support everything that earlier ones do."""


COMPILE = ("-std=c++17", "-O3", "-fPIC", "-shared")
"""Options for every library."""
CONVOLUTIONS = ("-ffp-contract=fast", "-pthread", "-isystem")
"""Additional options for `conv/native/conv3x3.cc`; the folder of XLA's headers follows."""


def best_processor(machine: str, features: Collection[str]) -> Processor | None:
    """Return the last type in `PROCESSORS` that a machine with these features supports, or None."""
    usable = [one for one in PROCESSORS if one.machine == machine and one.features <= set(features)]
    return usable[-1] if usable else None


def compiled_file(source: Path, processor: Processor) -> Path:
    """Return the path in a wheel of the library compiled from a source file."""
    return source.parent / "compiled" / f"{source.stem}-{processor.name}.so"
