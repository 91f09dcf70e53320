"""Claim: loading any mutated weight file gives a complete model or a `RepVGGError`, and never executes anything.

If the file has checksums, the model is the one that was saved, to the bit.

A few hundred mutations in CI; manually: `FUZZ_EXAMPLES=100000 pytest tests/weights/test_fuzz.py`.
"""

import codecs
import contextlib
import dataclasses
import encodings.cp437  # noqa: F401 (zipfile's codec for odd names: imported before watching)
import functools
import io
import json
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import repvgg_jax as rv
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.trees import flatten
from repvgg_jax.weights import WeightsWarning
from repvgg_jax.weights.safe_pickle import PickleError, Reader
from repvgg_jax.weights.torch_file import read_torch_file
from tests.helpers import torch_oracle
from tests.helpers.weight_files import TINY, assert_same_bits, bits, random_model, safetensors_bytes, torch_state

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=20),  # nothing here takes a tenth of a second, so more is a hang
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example),
)
FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
)


class Watch:
    """Records the interpreter's audit events for code being run or imported, while it is on."""

    on = False
    seen: list[str] = []  # noqa: RUF012 (one audit hook per process: it cannot be removed)

    @classmethod
    def hook(cls, name: str, details: tuple) -> None:
        if cls.on and name in FORBIDDEN:
            cls.seen.append(f"{name} {str(details)[:200]}")

    @classmethod
    @contextlib.contextmanager
    def watching(cls):
        cls.seen.clear()
        cls.on = True
        try:
            yield
        finally:
            cls.on = False
        assert not cls.seen


# Python imports a text encoding when it first meets it, and a file can name one.
for _encoding in ("ascii", "cp437", "latin-1", "utf-8", "raw_unicode_escape", "unicode_escape"):
    codecs.lookup(_encoding)

sys.addaudithook(Watch.hook)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    """Sound files of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    state = torch_state(TINY)
    torch.save(state, folder / "zip.pth")
    torch.save({"model": state, "epoch": 3, "config": {1, 2}, "range": range(3)}, folder / "checkpoint.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    network = torch_oracle.RepVGG((2, 1, 1, 1), (1 / 8, 1 / 16, 1 / 16, 1 / 16), 1, 5, deploy=False)
    torch.save({"epoch": 3, "network": network}, folder / "network.pth")
    model, variables = random_model(TINY)
    rv.save_weights(folder / "native.safetensors", model, variables)
    rv.save_weights(folder / "timm.safetensors", model, variables, family="timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsWarning)
        for path in folder.iterdir():  # whatever loading imports is imported here
            rv.load_weights(path, tensors_only=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def int8_file(tmp_path_factory):
    """A path for mutated files, the content of a sound quantised file, and its net."""
    path = tmp_path_factory.mktemp("int8") / "w.safetensors"
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    net = rv.quantize(*random_model(TINY, deploy=True), images, "naive", class_names=tuple("abcde"))
    rv.save_quantized(path, net)
    return path, path.read_bytes(), rv.load_quantized(path)


def structure(content: bytes) -> list[tuple[int, int]]:
    """Return the parts of a file that define its structure: its first bytes, its pickle, its directory."""
    pickle = content.find(b"data.pkl")
    parts = [(0, min(8000, len(content))), (max(0, len(content) - 8000), len(content))]
    return parts + ([(pickle, min(pickle + 12_000, len(content)))] if pickle >= 0 else [])


NUMBERS = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


KINDS = ("flip", "replace", "number", "delete", "repeat", "cut", "insert", "text")
TEXTS = (b"9" * 18, b"-1", b"1e9", b"[]", b"{", b'"', b"null", b"cos\nsystem\n", b"R", b".")


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to a file; prints briefly, whatever the size of the file."""

    kind: str
    part: int
    place: float
    length: int
    number: int
    data: bytes

    def apply(self, content: bytes) -> bytes:
        """Return `content` after the change, which is most often made in its structure."""
        parts = [*structure(content), (0, len(content))]
        start, stop = parts[self.part % len(parts)]
        at = start + int(self.place * (stop - start))
        before, after = content[:at], content[at:]
        if self.kind == "flip":
            return before + bytes(b ^ (1 << self.length % 8) for b in after[:1]) + after[1:]
        if self.kind == "number":
            width = (1, 2, 4, 8)[self.length % 4]
            return before + (self.number % 2 ** (8 * width)).to_bytes(width, "little") + after[width:]
        if self.kind == "text":
            text = TEXTS[self.length % len(TEXTS)]
            return before + text + after[len(text) :]
        return {
            "replace": before + self.data + after[len(self.data) :],
            "insert": before + self.data + after,
            "delete": before + after[self.length :],
            "repeat": before + after[: self.length] + after,
            "cut": before,
        }[self.kind]


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(KINDS),
        st.integers(0, 3),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.sampled_from(NUMBERS),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=4,
)


def assert_torch_agrees(path: Path) -> None:
    """Check that PyTorch does not refuse the file as unsafe and, if it reads it, finds the same tensors."""
    try:
        root = torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as damage:  # of a kind that concerns only torch
        event(f"torch: {type(damage).__name__}")
        return
    if any_entry_is_marked_as_folder(path):
        event("torch takes an entry for a folder, and returns memory that nothing was read into")
        return
    event("torch reads it too")
    with path.open("rb", buffering=0) as handle:
        ours = read_torch_file(handle, path)
        our_tensors = [(name, ours.read(tensor).tobytes()) for name, tensor in ours.tensors.items()]
    states = [root, *root.values()]
    assert our_tensors in [
        [(name, bits(tensor)) for name, tensor in state.items()] for state in states if is_state(state)
    ]


def any_entry_is_marked_as_folder(path: Path) -> bool:
    """Return whether a zip file's directory has an entry with the DOS attribute of a folder."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        return any(entry.external_attr & 0x10 for entry in file.infolist())
    return False


def is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, torch.Tensor) for item in value.values())


SOUND = ["zip.pth", "checkpoint.pth", "legacy.pth", "network.pth", "native.safetensors", "timm.safetensors"]
WITHOUT_CHECKSUMS = ("legacy.pth", "timm.safetensors")


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("tensors_only", [False, True])
def test_a_mutated_file_is_loaded_completely_or_refused(name, tensors_only, originals, tmp_path):
    path = tmp_path / name
    path.write_bytes(originals[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsWarning)
        sound = rv.load_weights(path, tensors_only=True)[1]

    @FUZZ
    @given(changes=CHANGES)
    def fuzz(changes):
        path.write_bytes(functools.reduce(lambda content, change: change.apply(content), changes, originals[name]))
        message, model, variables = None, None, {}
        try:
            with warnings.catch_warnings(), Watch.watching():
                warnings.simplefilter("ignore", WeightsWarning)
                model, variables = rv.load_weights(path, tensors_only=tensors_only)
        except rv.RepVGGError as error:
            message = str(error)
        if model is None:
            assert message
            assert "\n" not in message
            assert len(message) < 4000
            return
        shapes = {leaf: array.shape for leaf, array in flatten(variables).items()}
        channels = next(iter(shapes.values()))[2]
        assert shapes == expected_shapes(model.variant, model.deploy, model.num_classes, channels)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
        if name not in WITHOUT_CHECKSUMS:
            assert_same_bits(sound, variables)
        if name.endswith(".pth") and not tensors_only:
            assert_torch_agrees(path)

    fuzz()


@FUZZ
@given(changes=CHANGES)
def test_a_mutated_int8_file_is_loaded_unchanged_or_refused(changes, int8_file):
    path, content, net = int8_file
    path.write_bytes(functools.reduce(lambda content, change: change.apply(content), changes, content))
    for load in (rv.load_quantized, rv.inspect_weights, rv.load_weights):
        message: str | None = None
        loaded: Any = None
        try:
            with warnings.catch_warnings(), Watch.watching():
                warnings.simplefilter("ignore", WeightsWarning)
                loaded = load(path)
        except rv.RepVGGError as error:
            message = str(error)
        if loaded is None:
            assert message
            assert "\n" not in message
            assert len(message) < 4000
        else:
            assert load is not rv.load_weights
            loaded = cast(Any, loaded)
            assert (loaded.preprocessing, loaded.class_names) == (net.preprocessing, net.class_names)
            if load is rv.load_quantized:
                assert_same_bits(net.variables, loaded.variables)


def test_a_header_without_metadata_is_refused(int8_file):
    path, content, _ = int8_file
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": None}
    path.write_bytes(safetensors_bytes(header, content[8 + length :]))
    for load in (rv.load_quantized, rv.inspect_weights, rv.load_weights):
        with pytest.raises(rv.WeightsError, match="a RepVGG in any known naming scheme"):
            load(path)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
FRAGMENTS = [
    *OPCODES,
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"cos\nsystem\n",
    b"X\x07\x00\x00\x00storage",
    b"X\x01\x00\x00\x000",
    b"K\x01",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"q\x00",
    b"h\x00",
    b"((K\x01K\x02t",
    b"}",
]


@settings(FUZZ, max_examples=10 * EXAMPLES)
@given(parts=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=4)), max_size=60), lax=st.booleans())
def test_any_pickle_program_gives_plain_data_or_an_error(parts, lax):
    with Watch.watching(), contextlib.suppress(PickleError):
        Reader(tensors_only=lax).load(io.BytesIO(b"".join(parts) + b"."))
