"""Claim: PyTorch's files are read as by `torch.load(weights_only=True)`, whatever else they contain."""

import functools
import io
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._weights_only_unpickler import _get_allowed_globals

import repvgg_jax as rv
from repvgg_jax.trees import unflatten
from repvgg_jax.weights.pickle_names import HARMLESS
from repvgg_jax.weights.safe_pickle import REBUILDERS
from repvgg_jax.weights.torch_file import read_torch_file
from tests.helpers.weight_files import TINY, assert_same_bits, bits, random_arrays, refused, torch_state

pytestmark = pytest.mark.filterwarnings("ignore::repvgg_jax.weights.WeightsWarning")

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_read_as_torch_reads(path: Path, legacy: bool, *keys: str) -> None:
    """Check that every tensor of the state dict under `keys` has the same dtype, shape and bits in both readers."""
    theirs = torch.load(path, weights_only=True, mmap=not legacy)
    for key in keys:
        theirs = theirs[key]
    with path.open("rb", buffering=0) as handle:
        ours = read_torch_file(handle, path)
        assert list(ours.tensors) == list(theirs)
        for name, tensor in ours.tensors.items():
            expected = theirs[name]
            assert tensor.dtype.name == str(expected.dtype).removeprefix("torch."), name
            assert tensor.shape == tuple(expected.shape), name
            assert ours.read(tensor).tobytes() == bits(expected), name


def layouts() -> dict[str, torch.Tensor]:
    """Return tensors that are not simply contiguous."""
    kernel = torch.rand(6, 4, 3, 3)
    flat = torch.arange(100.0)
    return {
        "plain": torch.rand(4, 5),
        "transposed": torch.rand(4, 5).T,
        "permuted": torch.rand(2, 3, 4, 5).permute(3, 1, 0, 2),
        "channels last": kernel.to(memory_format=torch.channels_last),
        "channels last, one channel": torch.rand(6, 1, 3, 3).to(memory_format=torch.channels_last),
        "every second": torch.rand(8, 6)[::2, 1::3],
        "inside of a larger one": torch.rand(8, 9)[2:5, 3:7],
        "first view": flat[10:20],
        "second view": flat[20:50].view(5, 6),
        "third view": flat[90:],
        "scalar": torch.tensor(3.5),
        "element": torch.rand(5)[3],
        "empty": torch.zeros(0),
        "empty in one dimension": torch.zeros(3, 0, 2),
        "one row": torch.rand(7, 5)[3:4],
        "one column": torch.rand(7, 5)[:, 2:3],
        "stretched, but of one element": torch.rand(1).expand(1, 1),
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "frozen parameter": torch.nn.Parameter(torch.rand(3), requires_grad=False),
        "wants a gradient": torch.rand(3, requires_grad=True),
        "counter": torch.tensor(120_000),
    }


@FORMATS
def test_every_layout_is_read(legacy, tmp_path):
    assert_read_as_torch_reads(save(layouts(), tmp_path / "w.pth", legacy), legacy)


@FORMATS
def test_every_dtype_is_read(legacy, tmp_path):
    numbers = torch.arange(-3, 9).reshape(3, 4)
    names = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
    names += ["int8", "int16", "int32", "int64", "uint8", "bool"]
    state = {name: numbers.to(getattr(torch, name)).T for name in names}
    assert_read_as_torch_reads(save(state, tmp_path / "w.pth", legacy), legacy)


@st.composite
def views(draw):
    """Draw a tensor of up to four dimensions, as a view of a larger one: sliced, stepped, permuted."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(float(math.prod(shape))).reshape(shape)
    slices = [
        slice(draw(st.integers(0, size - 1)), draw(st.integers(1, size)), draw(st.integers(1, 3))) for size in shape
    ]
    return tensor[tuple(slices)].permute(draw(st.permutations(range(len(shape)))))


@FORMATS
def test_any_view_of_any_storage_is_read(legacy, tmp_path):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(views(), min_size=1, max_size=4))
    def check(tensors):
        path = save({f"t{i}": tensor for i, tensor in enumerate(tensors)}, tmp_path / "w.pth", legacy)
        assert_read_as_torch_reads(path, legacy)

    check()


@FORMATS
def test_state_dicts_of_real_modules_are_read(legacy, tmp_path):
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 2))
    for module in (block, torch.nn.parallel.DataParallel(block), block.half()):
        path = save(module.state_dict(), tmp_path / "w.pth", legacy)
        assert_read_as_torch_reads(path, legacy)
    save({"epoch": 3, "net": block.state_dict(), "best": torch.tensor(0.7)}, tmp_path / "w.pth", legacy)
    assert_read_as_torch_reads(tmp_path / "w.pth", legacy, "net")


@functools.cache
def other_entries() -> dict[str, Any]:
    """Return what trainers keep next to the weights and `weights_only` allows."""
    weight = torch.nn.Parameter(torch.rand(4, 3))
    optimizers = (torch.optim.SGD([weight], 0.1, momentum=0.9), torch.optim.AdamW([weight], amsgrad=True))
    for optimizer in optimizers:
        weight.sum().backward()
        optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], 10)
    shared = torch.rand(4, 3)
    with warnings.catch_warnings(action="ignore"):  # torch warns that it is a beta
        compressed = torch.eye(2).to_sparse_csr()
    tagged = torch.rand(2)
    tagged.note = "an attribute"  # type: ignore[attr-defined]
    return {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedule": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "random": torch.get_rng_state(),
        "shared": [shared, shared, shared[1:]],
        "stretched": torch.zeros(1).expand(5),
        "plain": {"set": {1, 2}, "complex": 1j, "bytes": b"ab", "bytearray": bytearray(b"c"), 7: None, "pi": 3.14},
        "counter": Counter("abca"),
        "torch": [torch.Size([1, 2]), torch.device("cpu"), torch.float16, torch.uint16, torch.sparse_coo],
        "sparse": torch.eye(2).to_sparse(),
        "compressed": compressed,
        "meta": torch.empty(3, device="meta"),
        "eight bits": torch.zeros(3).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(3).to(torch.uint16),
        "tagged": tagged,
        "large": 2**200,
        "nested": [[({"deep": torch.rand(1)},)]],
    }


@FORMATS
@pytest.mark.parametrize("name", other_entries())
def test_anything_next_to_the_weights_is_skipped(name, legacy, tmp_path):
    checkpoint = {"state_dict": torch_state(TINY), name: other_entries()[name], "epoch": 119}
    path = save(checkpoint, tmp_path / "w.pth", legacy)
    if not (legacy and name in ("eight bits", "unsigned")):  # torch itself cannot read legacy files with these
        assert_read_as_torch_reads(path, legacy, "state_dict")
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(path)[1])


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:TypedStorage")
def test_quantized_tensors_next_to_the_weights_are_skipped(tmp_path):
    quantized = torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)
    per_channel = torch.quantize_per_channel(torch.rand(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8)
    path = save({"model": torch_state(TINY), "quantized": [quantized, per_channel]}, tmp_path / "w.pth")
    assert_read_as_torch_reads(path, False, "model")


@FORMATS
def test_weights_may_share_storage_with_their_average_or_the_optimizer(legacy, tmp_path):
    state = torch_state(TINY)
    optimizer = {"state": {i: {"momentum_buffer": tensor} for i, tensor in enumerate(state.values())}}
    same = next(iter(state.values()))
    checkpoint = {"model": state, "ema": dict(state), "optimizer": optimizer, "twice": [same, same]}
    path = save(checkpoint, tmp_path / "w.pth", legacy)
    for ema in (False, True):
        assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(path, ema=ema)[1])


@FORMATS
def test_tensors_with_attributes_are_read(legacy, tmp_path):
    state = torch_state(TINY)
    state["linear.bias"].note = "kept by torch.save"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(state["linear.weight"])
    parameter.note = "on a parameter"  # type: ignore[attr-defined]
    state["linear.weight"] = parameter
    assert_read_as_torch_reads(save(state, tmp_path / "w.pth", legacy), legacy)


@FORMATS
def test_a_pickled_network_gives_its_tensors_without_running_its_code(legacy, tmp_path):
    from tests.helpers import torch_oracle

    network = torch_oracle.create("RepVGG-A0", 5, False)
    expected = network.state_dict()
    for value in (network, {"model": network, "epoch": 3}, torch.nn.DataParallel(network)):
        path = save(value, tmp_path / "w.pth", legacy)
        assert "tensors_only=True" in refused(path)
        with path.open("rb", buffering=0) as handle:
            file = read_torch_file(handle, path, tensors_only=True)
            ours = {name.removeprefix("module."): file.read(tensor).tobytes() for name, tensor in file.tensors.items()}
        assert ours == {name: bits(tensor) for name, tensor in expected.items()}
    assert rv.load_weights(path, tensors_only=True)[0].variant.name == "RepVGG-A0"


def test_torch_allows_every_name_that_we_allow():
    allowed = set(_get_allowed_globals())
    assert HARMLESS | REBUILDERS.keys() <= allowed
    other = {name for name in allowed - HARMLESS - REBUILDERS.keys() if not name.startswith("torch.")}
    assert not other


class Sparse(io.FileIO):
    """A file that leaves a hole where zeros are written to it."""

    def write(self, data: Any) -> int:
        view, step = memoryview(data).cast("B"), 1 << 20
        for start in range(0, len(view), step):
            piece = view[start : start + step]
            if np.frombuffer(piece, np.uint8).any():
                super().write(piece)
            else:
                self.seek(len(piece), io.SEEK_CUR)
        return len(view)


@pytest.mark.slow
def test_a_file_of_more_than_four_gigabytes_is_read(tmp_path):
    """Its records need 64-bit zip fields. All its zeros are holes in files, so they take neither disk nor memory."""
    path, count = tmp_path / "w.pth", 1_200_000_000
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(4 * count)
    zeros = torch.from_file(str(tmp_path / "zeros"), shared=False, size=count)
    with Sparse(path, "wb") as file:
        torch.save({"optimizer": zeros, "model": torch_state(TINY)}, file)
    if path.stat().st_blocks * 512 > 10**9:
        pytest.skip("this file system has no sparse files")
    assert path.stat().st_size > 2**32
    assert_read_as_torch_reads(path, False, "model")
