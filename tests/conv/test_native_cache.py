"""Claim: a library is loaded only from where nobody else can have put it, and a passing failure is not remembered."""

import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from repvgg_jax import compiler, ownership
from repvgg_jax.inference import plan_cache
from repvgg_jax.inference.plan import Plan, StagePlan
from repvgg_jax.machine import cache_folder
from repvgg_jax.ownership import check_own_file, find_private_folder, make_private_folder
from train.data import resize

NOBODY = 65534
NEEDS_COMPILER = pytest.mark.skipif(compiler._command(()) is None, reason="no C++ compiler")
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and an empty folder for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return cache_folder("native")


@pytest.fixture
def source(tmp_path) -> Path:
    """A library with one function, which returns 7."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "seven.cc"
    path.write_text('extern "C" int seven() { return 7; }\n', encoding="utf-8")
    return path


@pytest.fixture
def planted(tmp_path) -> Path:
    """A library whose constructor creates `tmp_path/ran`, and whose function returns 13."""
    path, library = tmp_path / "planted.cc", tmp_path / "planted.so"
    constructor = f'__attribute__((constructor)) static void run() {{ fclose(fopen("{tmp_path}/ran", "w")); }}'
    path.write_text(f'#include <cstdio>\n{constructor}\nextern "C" int seven() {{ return 13; }}\n', encoding="utf-8")
    command = compiler._command(())
    assert command is not None
    subprocess.run([*command, str(path), "-o", str(library)], check=True)
    return library


def seven(source: Path) -> int:
    library = compiler.load_library(source, "numbers")
    assert library is not None
    return library.seven()


def cached(cache: Path, suffix: str = ".so") -> Path:
    (path,) = cache.glob(f"*{suffix}")
    return path


def plant(library: Path, cache: Path, source: Path) -> Path:
    """Put a library where that of `source` would be, before it is loaded: a process loads each path only once."""
    path = make_private_folder(cache) / f"{compiler._digest(source, compiler._command(()) or [])}.so"
    path.unlink(missing_ok=True)
    shutil.copy(library, path)
    path.chmod(0o700)
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@NEEDS_COMPILER
def test_a_compiled_library_is_cached_for_the_user_alone(cache, source, monkeypatch, caplog):
    assert seven(source) == 7
    for folder in (cache, cache.parent, cache.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert cached(cache).stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiler, "_run", lambda command: pytest.fail("compiled twice"))
    assert seven(source) == 7
    assert not caplog.records


@NEEDS_COMPILER
def test_a_planted_library_would_run_if_the_user_owned_it(cache, source, planted, tmp_path):
    """Shows that the tests below can fail."""
    plant(planted, cache, source)
    assert seven(source) == 13
    assert (tmp_path / "ran").exists()


@NEEDS_COMPILER
@NEEDS_ROOT
def test_a_library_of_another_user_is_compiled_again(cache, source, planted, tmp_path, caplog):
    library = plant(planted, cache, source)
    os.chown(library, NOBODY, NOBODY)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert library.stat().st_uid == os.geteuid()
    assert f"{library} belongs to user" in warnings(caplog)


@NEEDS_COMPILER
def test_a_link_is_not_loaded(cache, source, planted, tmp_path, caplog):
    library = plant(planted, cache, source)
    library.unlink()
    library.symlink_to(planted)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert "is not a regular file" in warnings(caplog)
    assert planted.exists()


@NEEDS_COMPILER
def test_a_file_that_others_can_write_to_is_not_loaded(cache, source, planted, tmp_path, caplog):
    plant(planted, cache, source).chmod(0o777)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert "can be written to by others" in warnings(caplog)


@NEEDS_COMPILER
@pytest.mark.parametrize("level", [0, 1, 2])
def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(level, cache, source, planted, tmp_path, caplog):
    plant(planted, cache, source)
    [cache, cache.parent, cache.parent.parent][level].chmod(0o777)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert "numbers are compiled for this process alone, in a temporary folder: " in warnings(caplog)
    assert "can be written to by others" in warnings(caplog)
    assert list((tmp_path / "temporary").iterdir()) == []


@NEEDS_COMPILER
@NEEDS_ROOT
@pytest.mark.parametrize("level", [0, 1, 2])
def test_nothing_is_loaded_from_a_folder_of_another_user(level, cache, source, planted, tmp_path, caplog):
    plant(planted, cache, source)
    os.chown([cache, cache.parent, cache.parent.parent][level], NOBODY, NOBODY)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert "belongs to user" in warnings(caplog)


@NEEDS_COMPILER
def test_a_sticky_bit_makes_a_parent_folder_safe(cache, source, caplog):
    cache.parent.parent.mkdir()
    cache.parent.parent.chmod(0o1777)  # as /tmp
    assert seven(source) == 7
    assert cached(cache)
    assert not caplog.records


@NEEDS_COMPILER
def test_a_sticky_bit_does_not_make_the_librarys_folder_safe(cache, source, planted, tmp_path, caplog):
    plant(planted, cache, source)
    cache.chmod(0o1777)
    assert seven(source) == 7
    assert not (tmp_path / "ran").exists()
    assert "can be written to by others" in warnings(caplog)


@NEEDS_COMPILER
def test_without_a_safe_folder_there_is_no_native_code_and_no_failure(source, tmp_path, caplog):
    tmp_path.chmod(0o777)
    assert compiler.load_library(source, "numbers") is None
    assert f"no native numbers: {tmp_path} can be written to by others" in warnings(caplog)


@NEEDS_COMPILER
def test_without_a_home_folder_it_is_compiled_for_the_process(source, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # a relative path, which the specification says to ignore
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert seven(source) == 7
    assert "the user has no home folder" in warnings(caplog)
    assert not Path("cache").exists()


@NEEDS_COMPILER
@NEEDS_ROOT
def test_the_resizing_functions_are_checked_the_same_way(caplog):
    os.chown(make_private_folder(cache_folder("native")), NOBODY, NOBODY)
    assert resize._compiled("-O0") is not None
    resize._compiled.cache_clear()
    assert "resizing functions are compiled for this process alone" in warnings(caplog)


@NEEDS_ROOT
def test_a_plan_of_another_user_is_measured_again(monkeypatch):
    monkeypatch.setattr("repvgg_jax.conv.native.available", lambda: True)  # without compiling anything for this cache
    plan = Plan(1, 1, (StagePlan(1, ()),), "cost model")
    assert plan_cache.save_plan(plan, "float32")
    assert plan_cache.load_plan(plan, "float32") is not None
    (file,) = cache_folder("plans").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    os.chown(file, NOBODY, NOBODY)
    assert plan_cache.load_plan(plan, "float32") is None
    assert plan_cache.save_plan(plan, "float32")
    assert plan_cache.load_plan(plan, "float32") is not None
    cache_folder("plans").chmod(0o777)
    assert plan_cache.load_plan(plan, "float32") is None
    assert not plan_cache.save_plan(plan, "float32")


def test_the_users_private_group_may_write(tmp_path, monkeypatch):
    """As on systems that give each user a group and set the umask to 002."""
    folder = make_private_folder(tmp_path / "a" / "b")
    folder.chmod(0o775)
    monkeypatch.setattr(ownership, "_is_private_group", lambda path, group: True)
    assert find_private_folder(folder) == folder
    monkeypatch.setattr(ownership, "_is_private_group", lambda path, group: False)
    with pytest.raises(PermissionError, match="can be written to by others"):
        find_private_folder(folder)


def test_a_link_to_a_safe_folder_is_followed_once(tmp_path):
    make_private_folder(tmp_path / "real")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "real")
    assert make_private_folder(tmp_path / "shared" / "link" / "new") == tmp_path / "real" / "new"
    with pytest.raises(PermissionError):
        make_private_folder(tmp_path / "shared" / "new")
    assert not (tmp_path / "shared" / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    check_own_file(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make_private_folder(tmp_path / "file" / "new")


# Which failures are remembered.


class FakeCompiler:
    """A script in place of the compiler: does what `behave` sets, and counts how often it is called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._path, self._asked = folder / "fake-c++", folder / "asked"
        monkeypatch.setenv("CXX", str(self._path))
        self._path.touch(mode=0o755)
        self._status = self._path.stat()

    def behave(self, script: str) -> None:
        """Change the behaviour but not the time of installation, which would make it a different compiler."""
        self._path.write_text(f"#!/bin/sh\necho asked >> {self._asked}\n{script}\n", encoding="utf-8")
        os.utime(self._path, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))

    @property
    def asked(self) -> int:
        return len(self._asked.read_text(encoding="utf-8").splitlines()) if self._asked.exists() else 0


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeCompiler:
    return FakeCompiler(tmp_path, monkeypatch)


PASSING_FAILURES = {
    "disk full": "echo 'as: BFD: Fatal error: x.o: No space left on device' >&2; exit 1",
    "linker": "echo '/usr/bin/ld: final link failed: No space left on device' >&2; exit 1",
    "quota": "echo 'fatal error: error writing to /tmp/cc.s: Disk quota exceeded' >&2; exit 1",
    "memory": "echo 'cc1plus: out of memory allocating 65536 bytes after a total of 1 bytes' >&2; exit 1",
    "virtual memory": "echo 'virtual memory exhausted: Cannot allocate memory' >&2; exit 1",
    "child killed": "echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1",
    "killed": "kill -9 $$",
    "terminated": "kill -15 $$",
    "through a shell": "echo 'x.cc:1:1: error: no' >&2; exit 137",
    "not found": "echo 'exec: cc1plus: not found' >&2; exit 127",
    "says nothing": "exit 1",
}


@NEEDS_COMPILER
@pytest.mark.parametrize("failure", PASSING_FAILURES)
def test_a_passing_failure_is_not_remembered(failure, fake, cache, source, caplog):
    fake.behave(PASSING_FAILURES[failure])
    assert compiler.load_library(source, "numbers") is None
    assert "no native numbers: " in warnings(caplog)
    assert list(cache.iterdir()) == []
    fake.behave('exec c++ "$@"')
    assert seven(source) == 7
    assert fake.asked == 2


@NEEDS_COMPILER
def test_a_compiler_that_hangs_is_killed_with_its_children(fake, source, monkeypatch, tmp_path):
    fake.behave(f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1)
    assert compiler.load_library(source, "numbers") is None
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 300)
    fake.behave('exec c++ "$@"')
    assert seven(source) == 7


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # there may be no parent to collect it


@NEEDS_COMPILER
def test_a_real_compiler_on_a_full_disk_is_not_remembered(cache, source, monkeypatch, tmp_path):
    limited = tmp_path / "limited-c++"
    limited.write_text('#!/bin/sh\nulimit -f 1\nexec c++ "$@"\n', encoding="utf-8")  # half a KiB, then SIGXFSZ
    limited.chmod(0o755)
    monkeypatch.setenv("CXX", str(limited))
    assert compiler.load_library(source, "numbers") is None
    assert list(cache.iterdir()) == []


@NEEDS_COMPILER
def test_source_that_does_not_compile_is_remembered_for_a_day(fake, cache, source, caplog):
    source.write_text("not C++\n", encoding="utf-8")
    fake.behave('exec c++ "$@"')
    for _ in range(2):
        assert compiler.load_library(source, "numbers") is None
    assert fake.asked == 1
    assert warnings(caplog).count("no native numbers: ") == 1
    rejected = cached(cache, ".failed")
    assert "error" in rejected.read_text(encoding="utf-8")
    for age in (compiler.FAILURE_SECONDS + 60, -60):  # too old, or from a clock that was wrong
        os.utime(rejected, (time.time(), time.time() - age))
        calls = fake.asked
        assert compiler.load_library(source, "numbers") is None
        assert fake.asked == calls + 1


@NEEDS_COMPILER
def test_a_success_forgets_the_failure(fake, cache, source):
    fake.behave("echo 'x.cc:1:1: error: no' >&2; exit 1")
    assert compiler.load_library(source, "numbers") is None
    rejected = cached(cache, ".failed")
    os.utime(rejected, (0, 0))
    fake.behave('exec c++ "$@"')
    assert seven(source) == 7
    assert not rejected.exists()


@NEEDS_COMPILER
@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more", b"text"])
def test_a_damaged_library_is_compiled_again(content, cache, source, tmp_path):
    (tmp_path / "damaged").write_bytes(content)
    library = plant(tmp_path / "damaged", cache, source)
    assert seven(source) == 7
    assert library.read_bytes() != content


@NEEDS_COMPILER
def test_an_interrupted_compilation_leaves_no_compiler_running(fake, cache, source, tmp_path):
    """Ctrl-C reaches only this process: the compiler has its own process group."""
    fake.behave(f"echo $$ > {tmp_path}/child; sleep 0.3; kill -INT {os.getpid()}; sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        compiler.load_library(source, "numbers")
    assert not is_running(int((tmp_path / "child").read_text(encoding="utf-8")))
    assert list(cache.iterdir()) == []
