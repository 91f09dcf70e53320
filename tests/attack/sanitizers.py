"""`python -m tests.attack.sanitizers`: run the C++ on random shapes, under sanitizers and between guard pages.

Each program in `native/` calls the handlers of `conv3x3.cc` (float32, bfloat16, INT8, Winograd, training, gradients) or
`resize.cc` directly, without Python or XLA, and compares each result with the definition. It is built several times:
with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer, and as it is shipped, with each buffer's end
(or beginning) at an inaccessible page, for every instruction set that the sources have code for.
"""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .report import Attack, attempts, finish

FOLDER = Path(__file__).resolve().parent / "native"
ROOT = FOLDER.parent.parent.parent
WORK = 3_000_000
"""Multiplications of the largest case."""
MEMORY = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-O1", "-g", "-fsanitize=thread")
GUARDED = ("-O3", "-DGUARD_PAGES")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@dataclasses.dataclass(frozen=True)
class Build:
    """One way to build a program, the number of cases to try, and, for another processor, the emulator to run it."""

    program: str
    name: str
    options: tuple[str, ...]
    cases: int
    mode: str = "alone"
    compiler: str | None = None
    emulator: tuple[str, ...] = ()

    def command(self, compiler: str, to: Path) -> list[str]:
        """Return the compiler's command line."""
        sources, contract = {
            "convolutions": (ROOT / "repvgg_jax" / "conv" / "native", "fast"),
            "resizing": (ROOT / "train" / "data", "off"),
        }[self.program]
        folders = [f"-I{FOLDER}", f"-I{sources}"]
        options = ["-std=c++17", f"-ffp-contract={contract}", "-pthread", *self.options]
        return [compiler, *options, *folders, f"{FOLDER / self.program}.cc", "-o", f"{to}"]


def builds() -> list[Build]:
    """Return the builds that this machine can compile and run."""
    here, others = "-mcpu=native", {}
    flags: list[str] = []
    if platform.machine() == "x86_64":
        here, others = "-march=native", {"SSE2": "-march=x86-64"}
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        others |= {"SSE4.2": "-march=x86-64-v2"} | ({"AVX2": "-march=x86-64-v3"} if "avx2" in flags else {})
    all_builds = [
        Build("convolutions", "convolutions, AddressSanitizer and UBSan", (*MEMORY, here), 4000),
        Build(
            "convolutions",
            "convolutions called together, AddressSanitizer and UBSan",
            (*MEMORY, here),
            1000,
            "together",
        ),
        Build("convolutions", "convolutions, ThreadSanitizer", (*THREADS, here), 1000),
        Build("convolutions", "convolutions called together, ThreadSanitizer", (*THREADS, here), 1000, "together"),
        Build("convolutions", "convolutions, guard pages", (*GUARDED, here), 20_000),
        Build("resizing", "resizing, AddressSanitizer and UBSan", (*MEMORY, here), 10_000),
        Build("resizing", "resizing, guard pages", (*GUARDED, here), 20_000),
    ]
    if "amx_tile" in flags:
        untiled = (here, "-mno-amx-tile")
        all_builds += [
            Build("convolutions", "convolutions, AVX-512, AddressSanitizer and UBSan", (*MEMORY, *untiled), 2000),
            Build("convolutions", "convolutions, AVX-512, guard pages", (*GUARDED, *untiled), 5000),
        ]
    for name, option in others.items():
        if name != "SSE4.2":  # for the convolutions, the same as SSE2
            all_builds += [
                Build("convolutions", f"convolutions, {name}, AddressSanitizer and UBSan", (*MEMORY, option), 1000),
                Build("convolutions", f"convolutions, {name}, guard pages", (*GUARDED, option), 5000),
            ]
        all_builds += [
            Build("resizing", f"resizing, {name}, AddressSanitizer and UBSan", (*MEMORY, option), 3000),
            Build("resizing", f"resizing, {name}, guard pages", (*GUARDED, option), 5000),
        ]
    if shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR):
        options = (*GUARDED, "-march=armv8-a", "-static")
        all_builds += [
            Build(
                program, f"{program}, Arm (emulated), guard pages", options, 500, "alone", ARM_COMPILER, (ARM_EMULATOR,)
            )
            for program in ("convolutions", "resizing")
        ]
    return all_builds


def compiled(build: Build, folder: Path) -> Path:
    """Return the program, compiled unless another build had the same options."""
    compiler = (
        build.compiler or shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    )
    if compiler is None:
        sys.exit("error: there is no C++ compiler here: set CXX")
    path = folder / "_".join((build.program, *build.options)).replace("/", "_")
    if not path.exists():
        done = subprocess.run(build.command(compiler, path), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {compiler} failed\n{done.stderr}")
    return path


def attack(build: Build, program: Path, cases: int, first: int = 0) -> Attack:
    """Run the cases; after a crash, another process runs the remaining ones."""
    result, end = Attack(build.name), first + cases
    # ThreadSanitizer knows only some address-space layouts.
    fixed = ["setarch", "-R"] if "-fsanitize=thread" in build.options and shutil.which("setarch") else []
    options = {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    while first < end:
        command = [*fixed, *build.emulator, str(program), str(first), str(end - first), build.mode, str(WORK)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | options)
        lines = done.stdout.splitlines()
        begun = {int(line.split()[1]) for line in lines if line.startswith("case ")}
        wrong = [line for line in lines if line.startswith("FAILED ")]
        for line in wrong:
            result.count(False, line)
        crashed = done.returncode not in (0, 1) or len(begun) < end - first
        if crashed:
            stderr = "\n".join(done.stderr.splitlines()[:30])
            result.count(False, f"case {max(begun, default=first)} ended the process ({done.returncode}): {stderr}")
        result.survived += len(begun) - len({line.split()[2] for line in wrong}) - crashed
        first = max(begun, default=first) + 1
    return result


def main() -> int:
    """Compile and run everything, or the builds whose names contain the first argument."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [build for build in builds() if part in build.name]
    if not chosen:
        names = ", ".join(f"'{build.name}'" for build in builds())
        sys.exit(f"error: no build's name contains {part!r}; there are {names}")
    with tempfile.TemporaryDirectory() as folder:
        return max(finish(attack(build, compiled(build, Path(folder)), attempts(build.cases))) for build in chosen)


if __name__ == "__main__":
    sys.exit(main())
