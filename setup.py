"""Build the wheel: pure Python, or with the convolutions compiled where `REPVGG_JAX_COMPILE_WHEEL` names a machine.

`REPVGG_JAX_COMPILE_WHEEL=x86_64` compiles `conv3x3.cc` for every x86-64 processor of `repvgg_jax/processors.py`;
`aarch64` with `CXX=aarch64-linux-gnu-g++` cross-compiles. Without the variable, the wheel is pure, and the convolutions
are compiled on the user's machine when they are first needed (`repvgg_jax/compiler.py`).
"""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MACHINE = os.environ.get("REPVGG_JAX_COMPILE_WHEEL", "")
SOURCE = Path("repvgg_jax/conv/native/conv3x3.cc")
# XLA takes what was compiled with its older headers, so that these are the oldest that pyproject.toml allows.
HEADERS = "jaxlib==0.10.0"


class BuildPython(build_py):
    """Copy the package, and put compiled libraries beside the C++ source."""

    def run(self):
        """Copy, then compile."""
        super().run()
        if self.editable_mode:
            return
        # What an earlier build left would come along.
        shutil.rmtree(Path(self.build_lib, SOURCE).parent / "compiled", ignore_errors=True)
        if MACHINE:
            compile_all(Path(self.build_lib))


class Package(Distribution):
    """The package, which goes to the folder for platform-specific files if anything of it is compiled."""

    def has_ext_modules(self):
        """Return whether anything is compiled."""
        return bool(MACHINE)


class BuildWheel(bdist_wheel):
    """Name the machine in the wheel's tag, but no version of Python: the libraries do not use its interface."""

    def finalize_options(self):
        """Name the machine that is compiled for, which need not be this one."""
        if MACHINE:
            self.plat_name = f"linux_{MACHINE}"
        super().finalize_options()

    def get_tag(self):
        """Return the tag of any Python 3."""
        return "py3", "none", super().get_tag()[2]


def compile_all(package: Path) -> None:
    """Compile the convolutions for every processor of the machine, into the copied package."""
    import jaxlib

    table = runpy.run_path(str(ROOT / "repvgg_jax" / "processors.py"))  # the package itself cannot be imported yet
    kinds = [kind for kind in table["PROCESSORS"] if kind.machine == MACHINE]
    if not kinds:
        known = ", ".join(sorted({kind.machine for kind in table["PROCESSORS"]}))
        raise SystemExit(f"REPVGG_JAX_COMPILE_WHEEL must be one of {known}, not {MACHINE!r}")
    include = str(Path(jaxlib.__file__).parent / "include")
    for kind in kinds:
        library = table["compiled_file"](package / SOURCE, kind)
        library.parent.mkdir(exist_ok=True)
        command = [os.environ.get("CXX", "c++"), *table["COMPILE"], *kind.options]
        print(f"compiling {SOURCE} for {kind.name}", flush=True)
        options = [*table["CONVOLUTIONS"], include, "-s"]
        subprocess.run([*command, *options, str(SOURCE), "-o", str(library.resolve())], cwd=ROOT, check=True)


setup(
    distclass=Package,
    cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel},
    setup_requires=[HEADERS] if MACHINE else [],
)
