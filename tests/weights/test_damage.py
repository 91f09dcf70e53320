"""Claim: if a file has checksums, no damage to it goes unnoticed; if it has none, it still loads."""

import json
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.trees import unflatten
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

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8))
NAMES = ("a", "b", "c", "d", "e")


def with_bit_flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def data_of(path: Path, name: str) -> int:
    """Return where a record's bytes begin, according to Python's own reader."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        record = next(r for r in archive.infolist() if r.filename.endswith(name))
        file.seek(record.header_offset + 26)
        return record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


@pytest.mark.parametrize(
    ("record", "name"),
    [("/data/0", "stage0.rbr_dense.conv.weight"), ("/data/7", "stage0.rbr_1x1.bn.weight"), ("/data.pkl", "data.pkl")],
)
def test_a_flipped_bit_in_a_zip_file_is_found_by_its_checksum(record, name, tmp_path):
    torch.save({"model": torch_state(TINY), "epoch": 9}, tmp_path / "w.pth")
    sound = (tmp_path / "w.pth").read_bytes()
    for bit in (0, 3, 7):
        (tmp_path / "bad.pth").write_bytes(with_bit_flipped(sound, data_of(tmp_path / "w.pth", record) + 5, bit))
        with zipfile.ZipFile(tmp_path / "bad.pth") as archive:
            assert str(archive.testzip()).endswith(record)  # Python's reader agrees
        message = refused(tmp_path / "bad.pth")
        assert "CRC-32 does not match" in message
        assert f"{name} is damaged" in message


def test_a_damaged_checksum_is_damage_too(tmp_path):
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    sound = (tmp_path / "w.pth").read_bytes()
    entry = sound.rindex(b"PK\x01\x02", 0, sound.rindex(b"/data/3"))
    (tmp_path / "bad.pth").write_bytes(sound[: entry + 16] + bytes(4) + sound[entry + 20 :])
    assert "CRC-32 does not match" in refused(tmp_path / "bad.pth")


def test_tensors_in_one_storage_are_covered_by_its_checksum(tmp_path):
    state = torch_state(TINY)
    one = torch.arange(40.0) + 1
    for number, leaf in enumerate(("weight", "bias", "running_mean", "running_var")):
        state[f"stage1.1.rbr_dense.bn.{leaf}"] = one[8 * number : 8 * number + 8]
    state["stage1.1.rbr_dense.conv.weight"] = state["stage1.1.rbr_dense.conv.weight"].to(
        memory_format=torch.channels_last
    )
    torch.save(state, tmp_path / "w.pth")
    scale = rv.load_weights(tmp_path / "w.pth")[1]["params"]["stage1_1"]["rbr_dense"]["bn"]["scale"]
    np.testing.assert_array_equal(scale, one[:8])
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        shared = next(r.filename for r in archive.infolist() if r.file_size == 160)
    start = data_of(tmp_path / "w.pth", shared)
    for element in (0, 9, 39):  # the last belongs to no tensor
        sound = (tmp_path / "w.pth").read_bytes()
        (tmp_path / "bad.pth").write_bytes(with_bit_flipped(sound, start + 4 * element))
        assert "stage1.1.rbr_dense.bn" in refused(tmp_path / "bad.pth")


def test_zip_files_without_checksums_load(tmp_path):
    """`torch.serialization.set_crc32_options(False)` writes zeros."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch_state(TINY), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.pth")[1])


@pytest.mark.parametrize("form", ["training", "deploy", "int8"])
def test_no_single_bit_of_a_native_file_can_change_its_meaning(form, tmp_path):
    path, rng = tmp_path / "w.safetensors", np.random.default_rng(0)
    model, variables = random_model(SMALL, deploy=form != "training")
    if form == "int8":
        images = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
        net = rv.quantize(model, variables, images, "naive", class_names=NAMES)
        rv.save_quantized(path, net)
        variables, load = net.variables, lambda path: rv.load_quantized(path).variables
    else:
        rv.save_weights(path, model, variables, class_names=NAMES, num_batches_tracked=9)
        load = lambda path: rv.load_weights(path)[1]  # noqa: E731
    info, sound = rv.inspect_weights(path), path.read_bytes()
    end = 8 + struct.unpack("<Q", sound[:8])[0]
    positions = [*rng.choice(end, 150, replace=False), *(end + rng.choice(len(sound) - end, 50, replace=False))]
    # The most critical ones: the values of the preprocessing, and the checksums themselves.
    positions += [sound.index(b"0.485") + 2, sound.index(b"0.229") + 3, sound.index(b"crc32") + 30, sound.rindex(b'"}')]
    refusals = 0
    for position in positions:
        (tmp_path / "bad.safetensors").write_bytes(with_bit_flipped(sound, int(position), int(rng.integers(8))))
        try:
            assert rv.inspect_weights(tmp_path / "bad.safetensors") == info
            assert_same_bits(variables, load(tmp_path / "bad.safetensors"))
        except rv.WeightsError:
            refusals += 1
    assert refusals > 190


def test_a_native_file_names_the_damaged_tensor(tmp_path):
    model, variables = random_model(SMALL)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    sound = (tmp_path / "w.safetensors").read_bytes()
    length = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + length])
    begin = header["params/stage2_0/rbr_1x1/bn/bias"]["data_offsets"][0]
    (tmp_path / "bad.safetensors").write_bytes(with_bit_flipped(sound, 8 + length + begin))
    assert "params/stage2_0/rbr_1x1/bn/bias is damaged" in refused(tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(sound.replace(b"0.485", b"0.785"))
    assert "damaged header (ValueError: its CRC-32 does not match" in refused(tmp_path / "bad.safetensors")
    # Names that are swapped keep their shapes: only the checksums reveal it.
    one, other = (f"params/stage2_0/rbr_1x1/bn/{leaf}" for leaf in ("bias", "scale"))
    header[one], header[other] = header[other], header[one]
    (tmp_path / "bad.safetensors").write_bytes(safetensors_bytes(header, sound[8 + length :]))
    assert "is damaged" in refused(tmp_path / "bad.safetensors")


def test_native_files_without_checksums_load(tmp_path):
    """Written by releases before 0.1."""
    model, variables = random_model(SMALL)
    rv.save_weights(tmp_path / "w.safetensors", model, variables, class_names=NAMES)
    content = (tmp_path / "w.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    native = json.loads(header["__metadata__"]["repvgg_jax"])
    del native["crc32"]
    header["__metadata__"] = {"repvgg_jax": json.dumps(native)}
    (tmp_path / "old.safetensors").write_bytes(safetensors_bytes(header, content[8 + length :]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(variables, rv.load_weights(tmp_path / "old.safetensors")[1])
    assert rv.inspect_weights(tmp_path / "old.safetensors").class_names == NAMES
