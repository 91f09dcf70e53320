"""Claim: no file runs code or takes more memory than its length, and every bad one is refused in one line."""

import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pickle import EXT1, INST, LONG1, MARK, NEWOBJ, NEXT_BUFFER, OBJ, PROTO, REDUCE, STOP, TUPLE1, TUPLE2

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.trees import unflatten
from tests.helpers.pickle_program import START, name_of, text
from tests.helpers.weight_files import (
    TINY,
    assert_same_bits,
    random_arrays,
    random_model,
    refused,
    safetensors_bytes,
    torch_state,
)

pytestmark = pytest.mark.filterwarnings("ignore::repvgg_jax.weights.WeightsWarning")


def rewrite_pickle(source: Path, target: Path, change: Callable[[bytes], bytes]) -> None:
    """Copy a PyTorch zip file, replacing `data.pkl` by its changed content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(record.filename, change(data) if record.filename.endswith("/data.pkl") else data)


class Attack:
    """Unpickles to a call that creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture
def config_module(monkeypatch):
    """A module like yacs, with which the authors' trainer pickles its config, and which records being used."""
    module = types.ModuleType("yacs_config")

    class CfgNode(dict):
        used = False

        def __setstate__(self, state):
            CfgNode.used = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs_config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs_config", module)
    return module


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_trainers_checkpoint_is_refused_and_its_tensors_load_safely(legacy, config_module, tmp_path, monkeypatch):
    config = config_module.CfgNode(model=config_module.CfgNode(name="tiny"), lr=0.1)
    config.marked = True
    checkpoint = {
        "model": OrderedDict(torch_state(TINY)),
        "ema": OrderedDict(torch_state(TINY, seed=1)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": np.float64(0.1)}]},
        "config": config,
        "epoch": 119,
        "seen": {1, 2},
        "range": range(3),
    }
    torch.save(checkpoint, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)
    message = refused(tmp_path / "w.pth")
    assert "which runs no code" in message
    assert "tensors_only=True" in message

    monkeypatch.setattr(importlib, "import_module", None)
    monkeypatch.delitem(sys.modules, "yacs_config")
    for ema, seed in ((False, 0), (True, 1)):
        _, variables = rv.load_weights(tmp_path / "w.pth", tensors_only=True, ema=ema)
        assert_same_bits(unflatten(random_arrays(TINY, seed=seed)), variables)
    assert not config_module.CfgNode.used


@pytest.mark.parametrize("tensors_only", [False, True])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_never_runs(legacy, tensors_only, tmp_path):
    for place in ("beside", "instead", "key"):
        mark = tmp_path / "ran"
        state: dict = dict(torch_state(TINY))
        checkpoint = {
            "beside": {"state_dict": state, "extra": Attack(mark)},
            "instead": {**state, "linear.bias": Attack(mark)},
            "key": {**state, Attack(mark): torch.zeros(1)},
        }[place]
        torch.save(checkpoint, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        if place == "instead" or not tensors_only:
            refused(tmp_path / "w.pth", tensors_only=tensors_only)
        else:
            rv.load_weights(tmp_path / "w.pth", tensors_only=tensors_only)
        assert not mark.exists()
        torch.load(tmp_path / "w.pth", weights_only=False)
        assert mark.exists(), "the attack itself does not work"
        mark.unlink()


def attacks() -> dict[str, bytes]:
    """Return pickles that name, build or call something."""
    system, hundred_gigabytes = name_of("os", "system"), LONG1 + b"\x05" + (25 << 32).to_bytes(5, "little")
    return {
        "eval": START + name_of("__builtin__", "eval") + text("1+1") + TUPLE1 + REDUCE + STOP,
        "bytearray of 100 GB": START + name_of("__builtin__", "bytearray") + hundred_gigabytes + TUPLE1 + REDUCE + STOP,
        "extension registry": START + EXT1 + b"\x01" + STOP,
        "instance": MARK + INST + b"os\nsystem\n" + STOP,
        "object": MARK + system + text("true") + OBJ + STOP,
        "newobj": START + name_of("os", "popen") + text("true") + TUPLE1 + NEWOBJ + STOP,
        "out-of-band buffer": PROTO + b"\x05" + NEXT_BUFFER + STOP,
        "getattr": START + name_of("builtins", "getattr") + system + TUPLE2 + REDUCE + STOP,
    }


@pytest.mark.parametrize("which", attacks())
@pytest.mark.parametrize("tensors_only", [False, True])
def test_raw_pickle_attacks_are_refused(which, tensors_only, tmp_path):
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    rewrite_pickle(tmp_path / "w.pth", tmp_path / "bad.pth", lambda _: attacks()[which])
    refused(tmp_path / "bad.pth", tensors_only=tensors_only)
    (tmp_path / "raw.pth").write_bytes(attacks()[which])
    refused(tmp_path / "raw.pth", tensors_only=tensors_only)


def test_declared_sizes_beyond_the_file_are_refused_before_allocation(tmp_path):
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(name)
    first = data.index(b"K\xd8")  # 216 = 8 x 3 x 3 x 3 values of the first kernel
    changes = {
        "declares": data[:first] + b"\x8a\x05\x00\x00\x00\x00\x19" + data[first + 2 :],
        "beyond its storage": data.replace(b"(K\x08K\x03K\x03K\x03t", b"(M\xff\xffK\x03K\x03K\x03t", 1),
        "absurd sizes": data.replace(
            b"(K\x08K\x03K\x03K\x03t", b"(\x8a\x06\xff\xff\xff\xff\xff\x7fK\x03K\x03K\x03t", 1
        ),
        "share storage": data.replace(b"(K\x1bK\tK\x03K\x01t", b"(K\x01K\x01K\x01K\x01t", 1),
    }
    for reason, changed in changes.items():
        assert changed != data, reason
        rewrite_pickle(tmp_path / "w.pth", tmp_path / "bad.pth", lambda _, changed=changed: changed)
        assert reason in refused(tmp_path / "bad.pth")


def test_declared_sizes_in_legacy_files_are_checked_too(tmp_path):
    torch.save(torch_state(TINY), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "w.pth").read_bytes()
    for cut in range(1, 400, 3):  # within a storage's numbers, and within the count before them
        (tmp_path / "short.pth").write_bytes(data[:-cut])
        assert "declares more numbers than the file has" in refused(tmp_path / "short.pth")
    (tmp_path / "other.pth").write_bytes(pickle.dumps({"linear.weight": [1.0]}))
    assert "not one of PyTorch" in refused(tmp_path / "other.pth")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zip_bombs_are_refused(compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 100_000_000)
    assert "compressed zip records" in refused(tmp_path / "bomb.pth")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_other_zip_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "any.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "not one of PyTorch" in refused(tmp_path / "any.pth")
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(data[: len(data) // 2])
    assert "cut short?" in refused(tmp_path / "short.pth")
    scripted = torch.jit.script(torch.nn.ReLU())
    torch.jit.save(scripted, tmp_path / "script.pt")
    assert "TorchScript" in refused(tmp_path / "script.pt")


@pytest.fixture
def zip_file(tmp_path) -> Path:
    """A sound file as PyTorch writes it."""
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def with_record(source: Path, name: str, data: bytes = b"", comment: bytes = b"") -> bytes:
    """Return a zip file's bytes with one more record, and optionally a comment at the end."""
    content = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(content, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, about duplicate names
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        new.writestr(name, data)
        new.comment = comment
    return content.getvalue()


def test_zip_files_that_readers_interpret_differently_are_refused(zip_file, tmp_path):
    sound = zip_file.read_bytes()
    with zipfile.ZipFile(zip_file) as archive:
        kernel = next(record for record in archive.infolist() if record.filename.endswith("/data/0"))
    folder = kernel.filename.split("/")[0]
    header, name_in_header = kernel.header_offset, kernel.header_offset + 30
    encrypted = bytearray(sound)
    encrypted[sound.rindex(b"PK\x01\x02") + 8] |= 1
    second_directory = b"PK\x05\x06" + bytes(18)
    for content, words in (
        (with_record(zip_file, f"{folder}/data/0", bytes(864)), "not one of PyTorch"),
        (with_record(zip_file, "data/0", bytes(864)), "not one of PyTorch"),
        (with_record(zip_file, f"{folder}/other", comment=second_directory), "zip directory is not where"),
        (with_record(zip_file, f"{folder}/other", comment=b"hello"), "no zip directory at its end"),
        (sound + b"\n", "no zip directory at its end"),
        (b"PK\x03\x04" + sound, "zip directory is not where"),
        (bytes(encrypted), "not one of PyTorch"),
        (sound[:name_in_header] + b"X" + sound[name_in_header + 1 :], "not what the directory says"),
        (sound[:header] + b"X" + sound[header + 1 :], "a damaged zip record"),
    ):
        (tmp_path / "bad.pth").write_bytes(content)
        assert words in refused(tmp_path / "bad.pth")


def test_a_zip_file_with_an_unused_record_loads(zip_file, tmp_path):
    with zipfile.ZipFile(zip_file) as archive:
        folder = archive.namelist()[0].split("/")[0]
    (tmp_path / "good.pth").write_bytes(with_record(zip_file, f"{folder}/other"))
    rv.load_weights(tmp_path / "good.pth")


def test_tensors_that_share_storage_are_refused(tmp_path):
    state = torch_state(TINY)
    state["stage1.1.rbr_dense.bn.weight"] = state["stage1.1.rbr_dense.bn.bias"]
    torch.save(state, tmp_path / "same.pth")
    assert "share or overlap storage" in refused(tmp_path / "same.pth")
    one = torch.zeros(12)
    state["stage1.1.rbr_dense.bn.weight"], state["stage1.1.rbr_dense.bn.bias"] = one[:8], one[4:]
    torch.save(state, tmp_path / "overlapping.pth")
    assert "share or overlap storage" in refused(tmp_path / "overlapping.pth")
    state["stage1.1.rbr_dense.bn.weight"] = torch.zeros(1).expand(8)
    torch.save(state, tmp_path / "expanded.pth")
    assert "share" in refused(tmp_path / "expanded.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_with_nan_or_infinity_are_refused(suffix, value, tmp_path):
    from safetensors.torch import save_file

    state = torch_state(TINY)
    state["stage2.1.rbr_1x1.conv.weight"][3, 2] = value
    (torch.save if suffix == ".pth" else save_file)(state, tmp_path / f"w{suffix}")
    assert "stage2.1.rbr_1x1.conv.weight has NaN or infinite values" in refused(tmp_path / f"w{suffix}")


def test_tensors_of_the_wrong_type_are_refused(tmp_path):
    for key, value, words in (
        ("linear.bias", torch.zeros(5, dtype=torch.int64), "int64 values, not floats"),
        ("linear.bias", torch.zeros(5, dtype=torch.complex64), "complex64 values, not floats"),
        ("linear.bias", torch.zeros(5).to_sparse(), "entries that are not dense tensors: linear.bias"),
        ("linear.bias", "text", "entries that are not dense tensors: linear.bias"),
        ("stage0.rbr_dense.bn.num_batches_tracked", torch.tensor(1.0), "float32 values, not integers"),
    ):
        torch.save({**torch_state(TINY), key: value}, tmp_path / "w.pth")
        assert words in refused(tmp_path / "w.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "pickled torch.nn.modules.linear.Linear" in refused(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds no weights, only a list" in refused(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes({}, length=10 * 2**30),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"\0" * 4),
        safetensors_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        safetensors_bytes(b'{"a":{},"a":{}}'),
        safetensors_bytes({"a": [1, 2]}),
        safetensors_bytes({"__metadata__": {"repvgg_jax": "{}"}}),
        safetensors_bytes(b"{not json"),
        b"\x05\0\0\0\0\0\0\0{",
    ],
    ids=["header", "tensor", "shape", "negative", "overlap", "nested", "repeat", "list", "empty", "text", "short"],
)
def test_false_safetensors_headers_are_refused(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert refused(tmp_path / "w.safetensors").startswith(f"cannot read {tmp_path / 'w.safetensors'}")


SOUND_VARIANT = {"num_blocks": [1, 1, 1, 1], "widths": [8, 8, 8, 8, 8]}
LIES = (
    ("variant", SOUND_VARIANT | {"num_blocks": [10**9, 1, 1, 1]}, "more blocks than tensors"),
    ("variant", SOUND_VARIANT | {"widths": [8, 8]}, "five positive numbers"),
    ("variant", SOUND_VARIANT | {"auxiliary_heads": {}}, "auxiliary_heads must be one of False, True, not {}"),
    (
        "variant",
        SOUND_VARIANT | {"crop_fraction": "wide"},
        "crop_fraction must be a number above 0 and up to 1, not 'wide'",
    ),
    ("variant", SOUND_VARIANT | {"groups": 0}, "groups must be a positive whole number, not 0"),
    (
        "variant",
        SOUND_VARIANT | {"squeeze_excite": []},
        "squeeze_excite must be one of None, before_relu, after_relu, not ()",
    ),
    ("variant", SOUND_VARIANT | {"colour": "red"}, "does not know: colour; it was written by release"),
    ("variant", "RepVGG-Z9", "unknown model"),
    ("variant", "RepVGG-A0", "does not fit RepVGG-A0; missing"),
    ("num_classes", 7, "does not fit a custom RepVGG; wrong shape: params/linear/kernel is [20, 5], not [20, 7]"),
    ("num_classes", "many", "valid integer"),
    ("version", 99, "format version 99"),
    ("class_names", ["one"], "1 class names for 5 classes"),
    ("form", "liquid", "KeyError"),
    ("num_batches_tracked", "many", "valid integer"),
    ("num_batches_tracked", 2**63, "valid integer"),
    ("preprocessing", {"image_size": 10**9}, "image_size is not an integer up to 16384"),
    ("preprocessing", {"mean": [float("nan")] * 3}, "mean and std must be finite"),
)


@pytest.mark.parametrize(("field", "value", "words"), LIES)
def test_false_native_headers_are_refused(field, value, words, tmp_path):
    rv.save_weights(tmp_path / "w.safetensors", *random_model(TINY))
    content = (tmp_path / "w.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    native = json.loads(header["__metadata__"]["repvgg_jax"]) | {field: value}
    lying = {**header, "__metadata__": {"repvgg_jax": json.dumps(native)}}
    (tmp_path / "bad.safetensors").write_bytes(safetensors_bytes(lying, data))
    assert words in refused(tmp_path / "bad.safetensors")


def test_other_files_are_named(tmp_path):
    for content, words in (
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"\xff\xd8\xff\xe0 a picture", "neither a safetensors nor a PyTorch file"),
        (b"x" * 257 + b"ustar" + b"\0" * 250, "a tar archive"),
    ):
        (tmp_path / "w.pth").write_bytes(content)
        assert words in refused(tmp_path / "w.pth")
    for name, words in (
        ("none.pth", "does not exist"),
        ("", "is a folder"),
        ("w.pth/x", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("n\0n", "null byte"),
    ):
        assert words in refused(tmp_path / name)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        assert "is not an ordinary file" in refused(tmp_path / "pipe.pth")


def test_the_content_decides_not_the_suffix(tmp_path):
    """Even if a file is neither."""
    model, variables = random_model(TINY)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    (tmp_path / "w.safetensors").rename(tmp_path / "renamed.pth")
    assert_same_bits(variables, rv.load_weights(tmp_path / "renamed.pth")[1])
    torch.save(torch_state(TINY), tmp_path / "renamed.safetensors")
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "renamed.safetensors")[1])
    (tmp_path / "page.safetensors").write_text("<html>", encoding="utf-8")
    assert "a web page" in refused(tmp_path / "page.safetensors")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"a": np.zeros(2)}))
    assert "a pickle, but not one of PyTorch" in refused(tmp_path / "raw.pth")


def test_reading_needs_neither_torch_nor_the_hub(tmp_path):
    """Importing the library, and loading a PyTorch file, import none of torch, tensorflow, huggingface_hub."""
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    program = f"""
import sys
import repvgg_jax as rv
rv.load_weights({str(tmp_path / "w.pth")!r})
print([name for name in ("torch", "tensorflow", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_truncated_while_being_read_is_refused(tmp_path):
    from repvgg_jax.weights.torch_file import read_torch_file

    torch.save(torch_state(TINY), tmp_path / "w.pth")
    with (tmp_path / "w.pth").open("rb+", buffering=0) as handle:
        file = read_torch_file(io.FileIO(handle.fileno(), closefd=False), tmp_path / "w.pth")
        handle.truncate(1000)
        with pytest.raises(rv.WeightsError, match="was cut short while it was read"):
            file.read(file.tensors["linear.weight"])
