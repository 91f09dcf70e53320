"""Claim: a path in a bucket reads and writes like a local path, and reports problems in one line."""

import contextlib
import random

import pytest

from repvgg_jax.errors import ConfigError, RepVGGError
from repvgg_jax.files import atomic_folder, atomic_path, check_target
from repvgg_jax.paths import option_place, place
from repvgg_jax.storage import BucketPath


def test_a_bucket_path_has_the_parts_of_a_path(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    path = BucketPath.parse("GS://bucket/runs/b3/")
    assert str(path) == "gs://bucket/runs/b3"
    assert str(path / "final.safetensors") == "gs://bucket/runs/b3/final.safetensors"
    assert ((path / "w.pth").name, (path / "w.pth").stem, (path / "w.pth").suffix) == ("w.pth", "w", ".pth")
    assert str(path.parent) == "gs://bucket/runs"
    assert str(path.parent.parent) == str(path.parent.parent.parent) == "gs://bucket"
    assert str(path.with_name("curves.png")) == "gs://bucket/runs/curves.png"
    assert place(path) is path


@pytest.mark.parametrize("url", ["abfss://c@a/x", "https://host/x", "hf2://x/y"])
def test_an_unknown_scheme_is_one_line(url):
    with pytest.raises(
        ConfigError, match=rf"^--workdir {url}: only local files and folders, gs:// and s3:// can be used"
    ):
        option_place("--workdir", url)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_library_is_one_line_that_names_the_extra(scheme, module, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    hint = rf"pip install -e '.\[{extra}\]'"
    with pytest.raises(ConfigError, match=rf"--init {scheme}://b/w.pth needs {module}, .*{hint}"):
        option_place("--init", f"{scheme}://b/w.pth")


def test_a_url_without_a_bucket_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="gs:// names no bucket; expected gs://BUCKET/NAME"):
        place("gs://")


@pytest.mark.parametrize("content", [b"", b"\r", b"a\r\r", b"a\r\n", b"a\n", b"a\n--==0==--\nb"])
def test_content_is_kept_to_the_byte(content, bucket, tmp_path):
    """gcsfs frames small objects by text, and one CRC in 256 ends with a CR."""
    (bucket / "written").write_bytes(content)
    (tmp_path / "local").write_bytes(content)
    (bucket / "uploaded").upload(tmp_path / "local")
    assert (bucket / "written").read_bytes() == content
    assert (bucket / "uploaded").read_bytes() == content


def test_files_and_folders_are_listed_and_read(bucket):
    file = bucket / "run/a/b.txt"
    assert not file.exists()
    assert list((bucket / "run").iterdir()) == []
    file.write_bytes(b"one")
    (bucket / "run/a.txt").write_bytes("zwölf".encode())
    (bucket / "running").write_bytes(b"")
    assert file.is_file()
    assert not file.is_dir()
    assert (bucket / "run").is_dir()
    assert not (bucket / "run").is_file()
    assert not (bucket / "ru").exists()
    assert [path.name for path in (bucket / "run").iterdir()] == ["a", "a.txt"]
    assert (bucket / "run/a.txt").read_text(encoding="utf-8") == "zwölf"
    assert (file.read_bytes(), file.size()) == (b"one", 3)
    assert {str(path): size for path, size in (bucket / "run").files().items()} == {
        f"{bucket.url}/run/a.txt": 6,
        f"{bucket.url}/run/a/b.txt": 3,
    }


def test_changes_by_another_process_are_seen(bucket):
    import fsspec

    folder = bucket / "run"
    (folder / "1").write_bytes(b"")
    assert [path.name for path in folder.iterdir()] == ["1"]
    other = fsspec.filesystem(folder.scheme, skip_instance_cache=True)
    other.pipe_file(f"{folder}/2", b"")
    assert [path.name for path in folder.iterdir()] == ["1", "2"]
    other.rm_file(f"{folder}/1")
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert not (folder / "1").exists()


def test_patterns_match_names_only(bucket):
    run = bucket / "lr=[0.1]"
    for name in ("10/metrics/metrics", "20/metrics/metrics", "20/facts/metadata", "x/metrics/other"):
        (run / name).write_bytes(b"")
    assert [path.key.removeprefix(f"{run.key}/") for path in run.glob("*/metrics/metrics")] == [
        "10/metrics/metrics",
        "20/metrics/metrics",
    ]
    assert [path.name for path in run.glob("[0-9]*")] == ["10", "20"]
    assert list((bucket / "none").glob("*")) == []


def test_folders_are_copied_moved_and_removed(bucket, tmp_path):
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    for name in ("z", "commit", "in/a"):
        (source / name).write_text(name, encoding="utf-8")
    bucket.proxy.requests.clear()
    (bucket / "there").upload_folder(source, last=["commit"])
    written = [path for method, path in bucket.proxy.requests if method in ("PUT", "POST")]
    assert len(written) == 3
    (bucket / "there").move_folder(bucket / "moved", first=["commit"])
    assert not (bucket / "there").exists()
    (bucket / "moved").download(tmp_path / "copy")
    copies = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
    assert copies == {"z", "commit", "in", "in/a"}
    assert (tmp_path / "copy" / "in" / "a").read_text(encoding="utf-8") == "in/a"
    bucket.proxy.requests.clear()
    (bucket / "moved").remove_folder(first=["commit"])
    removed = [path for method, path in bucket.proxy.requests if method == "DELETE"]
    assert "commit" in removed[0]
    assert len(removed) == 3
    assert not (bucket / "moved").exists()


def test_an_object_is_written_completely_or_not_at_all(bucket):
    path = bucket / "weights.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"first")
        assert temporary.suffix == ".bin"
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with contextlib.suppress(ZeroDivisionError), atomic_path(str(path)) as temporary:
        temporary.write_bytes(b"second")
        raise ZeroDivisionError
    assert path.read_bytes() == b"first"
    bucket.proxy.refuses = lambda method, about: method in ("PUT", "POST")
    with pytest.raises(RepVGGError, match=r"^cannot write (gs|s3)://.*/weights\.bin: \S+") as caught:  # noqa: SIM117
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"second")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert path.read_bytes() == b"first"


def test_only_one_of_two_writers_creates_an_object(bucket):
    if bucket.url.startswith("gs://"):
        pytest.skip("the emulator ignores ifGenerationMatch")
    (bucket / "lock").write_bytes(b"one", only_if_new=True)
    with pytest.raises(FileExistsError):
        (bucket / "lock").write_bytes(b"two", only_if_new=True)
    assert (bucket / "lock").read_bytes() == b"one"


def test_an_unwritable_target_is_reported_beforehand(bucket):
    (bucket / "run/x").write_bytes(b"")
    check_target(bucket / "run/y")
    with pytest.raises(RepVGGError, match="it is a folder"):
        check_target(bucket / "run")
    with pytest.raises(RepVGGError, match="it is a folder"):
        check_target((bucket / "x").parent.parent)
    with (
        pytest.raises(RepVGGError, match="a folder cannot be written atomically to a bucket"),
        atomic_folder(bucket / "net"),
    ):
        pass
    bucket.proxy.refuses = lambda method, about: True
    with pytest.raises(RepVGGError, match=r"^cannot write (gs|s3)://.*/y: \S"):
        check_target(bucket / "run/y")


def test_a_missing_bucket_is_one_line(bucket):
    scheme = bucket.url.partition(":")[0]
    where = place(f"{scheme}://no-such-bucket/x")
    with pytest.raises(RepVGGError, match=r"^cannot write \S+: \S"), atomic_path(where) as temporary:
        temporary.write_bytes(b"1")


@pytest.mark.slow
def test_a_failed_upload_in_parts_leaves_the_old_object(bucket, tmp_path):
    path, local, copy = bucket / "large.bin", tmp_path / "large.bin", tmp_path / "copy.bin"
    content = random.Random(0).randbytes(110_000_000)
    local.write_bytes(content)
    path.upload(local)
    path.download(copy)
    assert copy.read_bytes() == content
    local.write_bytes(content[::-1])
    allowed = iter(range(2))
    bucket.proxy.refuses = lambda method, about: method in ("PUT", "POST") and next(allowed, None) is None
    with pytest.raises(OSError, match=r"\S"):
        path.upload(local)
    assert next(allowed, None) is None, "it is sent in more than two requests"
    bucket.proxy.refuses = lambda method, about: False
    assert path.size() == len(content)
    assert path.read_bytes() == content
