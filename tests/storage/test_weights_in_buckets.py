"""Claim: wherever a weight file is accepted, one in a bucket can be read, and written completely or not at all."""

import json
import subprocess
import sys

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.weights import WeightsWarning, inspect_weights
from tests.helpers.commands import command, convert, error_of
from tests.helpers.repository import ROOT
from tests.helpers.weight_files import TINY, assert_same_bits, random_model


@pytest.fixture(scope="module")
def quantized_net():
    """A net with int8 weights."""
    model, variables = rv.to_deploy(*random_model(TINY))
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    return rv.quantize(model, variables, images)


@pytest.mark.parametrize("name", ["w.safetensors", "a folder/w [1].pth"])
def test_weights_are_read_back_bit_for_bit(name, bucket):
    model, variables = random_model(TINY)
    path = bucket / name
    rv.save_weights(str(path), model, variables)
    assert path.is_file()
    for spelled in (path, str(path)):
        loaded, numbers = rv.load_weights(spelled)
        assert loaded.variant.widths == TINY.widths
        assert_same_bits(numbers, variables)


def test_what_a_pytorch_file_cannot_store_is_in_a_side_file(bucket):
    model, variables = random_model(TINY)
    path = bucket / "w.pth"
    with pytest.warns(WeightsWarning, match=rf"written to {path}\.json"):
        rv.save_weights(path, model, variables, preprocessing=rv.Preprocessing(64))
    assert inspect_weights(path).preprocessing.image_size == 64
    (bucket / "w.pth.json").write_bytes(b"{}")
    assert inspect_weights(path).preprocessing.image_size == 224
    with pytest.raises(rv.WeightsError, match=rf"cannot write {path}\.json, .*a file of that name exists"):
        rv.save_weights(path, model, variables, preprocessing=rv.Preprocessing(64))


def test_a_quantised_net_is_read_back_bit_for_bit(bucket, quantized_net):
    rv.save_quantized(bucket / "int8.safetensors", quantized_net)
    assert_same_bits(rv.load_quantized(bucket / "int8.safetensors").variables, quantized_net.variables)


def test_messages_name_the_object_not_its_local_copy(bucket):
    for name, content, message in (
        ("empty.pth", b"", "cannot read {}: the file is empty"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{}", "cannot read {}: not a valid safetensors file"),
        ("folder/x", b"", "{} is a folder, not a weight file, and holds no checkpoints"),
    ):
        (bucket / name).write_bytes(content)
        path = bucket / name.removesuffix("/x")
        with pytest.raises(rv.WeightsError) as caught:
            rv.load_weights(path)
        assert str(caught.value).startswith(message.format(path))
        assert "/tmp" not in str(caught.value)
    with pytest.raises(rv.WeightsError, match=rf"^{bucket.url}/none does not exist$"):
        rv.load_weights(bucket / "none")
    bucket.proxy.refuses = lambda method, about: True
    with pytest.raises(rv.WeightsError, match=rf"^cannot read {bucket.url}/empty\.pth: \S") as caught:
        rv.load_weights(bucket / "empty.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_convert_reads_and_writes_in_a_bucket(bucket):
    model, variables = random_model(TINY)
    rv.save_weights(bucket / "train.safetensors", model, variables)
    source, target = f"{bucket.url}/train.safetensors", f"{bucket.url}/deploy.pth"
    done = convert(source, target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target}: ")
    assert rv.load_weights(target)[0].deploy
    assert "exists already: choose another name, or replace it with --overwrite" in error_of(convert(source, target))
    assert convert(source, target, "--overwrite").returncode == 0
    assert "is the same file as the input" in error_of(convert(source, f"{source}", "--overwrite"))
    done = convert("--inspect", target)
    assert done.returncode == 0
    assert done.stdout.startswith(target)
    done = convert(source, f"{bucket.url}/net.stablehlo")
    assert done.returncode == 0, done.stderr
    assert (bucket / "net.stablehlo").is_file()


def test_summary_names_the_net_of_an_object(bucket):
    model, variables = random_model(TINY)
    rv.save_weights(bucket / "w.safetensors", model, variables)
    done = command("repvgg_jax.__main__", "summary", f"{bucket.url}/w.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{bucket.url}/w.safetensors")


@pytest.mark.slow
def test_evaluation_has_weights_data_and_report_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from train.data import digits_builder

    prepared = digits_builder.prepare(tmp_path / "tfds")
    (bucket / "tfds" / digits_builder.NAME / digits_builder.VERSION).upload_folder(prepared)
    model, variables = random_model(TINY, num_classes=10)
    rv.save_weights(bucket / "w.safetensors", model, variables, preprocessing=rv.Preprocessing(32))
    where = ("--data-dir", f"{bucket.url}/tfds", "--report", f"{bucket.url}/report")
    done = command("train.evaluate", "digits", "train", f"{bucket.url}/w.safetensors", *where)
    assert done.returncode == 0, done.stderr
    assert f"from {bucket.url}/tfds/sklearn_digits to {tmp_path}/cache" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 360
    report = json.loads((bucket / "report/report.json").read_text(encoding="utf-8"))
    assert report["top1"] == result["top1"]
    assert {path.name for path in (bucket / "report").iterdir()} == {
        *("report.json", "per_class.csv", "confusion.csv", "confusion.png", "predictions.csv", "mistakes.png")
    }
    again = command("train.evaluate", "digits", "train", f"{bucket.url}/w.safetensors", *where)
    assert "copying" not in again.stderr
    assert not (bucket / "tfds/none").exists()
    done = command("train.evaluate", "cifar10", "train", f"{bucket.url}/w.safetensors", *where[:2])
    assert f"--data-dir {bucket.url}/tfds holds no data set called cifar10" in error_of(done)


@pytest.mark.parametrize(
    ("imports", "names"),
    [
        ("import repvgg_jax as rv; rv.load_weights, rv.save_weights", ("fsspec", "gcsfs", "s3fs")),
        (
            "import train.main, train.evaluate, convert.__main__",
            ("gcsfs", "s3fs", "aiobotocore"),
        ),
    ],
)
def test_no_storage_library_is_imported_before_a_bucket_is_used(imports, names):
    program = f"import sys; {imports}; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
