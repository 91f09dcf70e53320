"""Claim: a wheel's compiled convolutions are used where the processor has what they need, and only there."""

import ctypes
import functools
import itertools
import re
import shutil
from pathlib import Path

import pytest

from repvgg_jax import compiler, processors
from repvgg_jax.conv import native
from repvgg_jax.machine import processor_type
from repvgg_jax.processors import PROCESSORS, best_processor, compiled_file

SKYLAKE = {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"} | {
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Files as a wheel has them: the library of this machine, under the name of its processor."""
    processor, source = processor_type(), tmp_path / native.SOURCE.name
    if processor is None:
        pytest.skip("this machine is none of those that a wheel is compiled for")
    library = native._library()
    if library is None:
        pytest.skip("no native convolutions here")
    target = compiled_file(source, processor)
    target.parent.mkdir()
    shutil.copy(library._name, target)
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(native, "_register", lambda library: None)  # XLA takes one function of a name
    # A cache of its own: the library that this process has registered with XLA must stay the one that it uses.
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    return target


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", {"sse2", "avx"}, None),
        ("x86_64", SKYLAKE - {"avx512bw"}, "x86-64-v3"),
        ("x86_64", SKYLAKE, "x86-64-v4"),
        ("x86_64", SKYLAKE | {"avx512_vnni"}, "x86-64-v4-vnni"),
        ("x86_64", SKYLAKE | {"avx512_bf16"}, "x86-64-v4"),
        ("x86_64", SKYLAKE | {"avx512_vnni", "avx512_bf16"}, "x86-64-v4-bf16"),
        ("aarch64", {"fp", "asimd"}, "armv8-a"),
        ("ppc64le", SKYLAKE, None),
    ],
)
def test_the_best_that_the_processor_has_is_chosen(machine, features, name):
    best = best_processor(machine, features)
    assert (best and best.name) == name


def test_later_processors_of_a_machine_have_the_features_of_the_earlier_ones():
    for machine in {one.machine for one in PROCESSORS}:
        kinds = [one.features for one in PROCESSORS if one.machine == machine]
        assert all(old < new for old, new in itertools.pairwise(kinds))


def test_the_library_of_the_wheel_is_used_without_a_compiler(wheel, monkeypatch):
    monkeypatch.setattr(compiler, "_command", lambda options: pytest.fail("asked for a compiler"))
    assert native.available()
    library = native._library()
    assert library is not None
    assert library._name == str(wheel)


def test_one_that_cannot_be_loaded_is_compiled_instead(wheel, monkeypatch, caplog):
    wheel.unlink()
    wheel.write_bytes(b"\x7fELF and nothing more")
    compiled = object()
    monkeypatch.setattr(native, "load_library", lambda *arguments: compiled)
    assert native._library() is compiled
    assert "cannot load the wheel's compiled library" in caplog.text


def test_so_is_one_that_xla_refuses(wheel, monkeypatch, caplog):
    compiled, registered = object(), []

    def register(library):
        registered.append(library)
        if isinstance(library, ctypes.CDLL):
            raise RuntimeError("unsupported FFI version")

    monkeypatch.setattr(native, "load_library", lambda *arguments: compiled)
    monkeypatch.setattr(native, "_register", register)
    assert native._library() is compiled
    assert len(registered) == 2
    assert "unsupported FFI version" in caplog.text


def test_a_processor_that_no_wheel_knows_gets_what_its_compiler_makes(wheel, monkeypatch):
    compiled = object()
    monkeypatch.setattr(compiler, "processor_type", lambda: None)
    monkeypatch.setattr(native, "load_library", lambda *arguments: compiled)
    assert native._library() is compiled


def test_setup_reads_the_table_without_the_package():
    """As it runs before any dependency is installed."""
    assert processors.__file__ is not None
    text = Path(processors.__file__).read_text(encoding="utf-8")
    modules = re.findall(r"^(?:import|from) ([a-z.]+)", text, re.M)
    assert modules
    assert set(modules) <= {"dataclasses", "collections.abc", "pathlib"}
