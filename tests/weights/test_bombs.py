"""Claim: a small file that demands endless work or memory is refused in seconds, within a GB, in one line."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from pickle import (
    APPEND,
    APPENDS,
    BINBYTES8,
    BINGET,
    BINPERSID,
    BINPUT,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    LONG4,
    LONG_BINPUT,
    MARK,
    NEWTRUE,
    NONE,
    POP,
    REDUCE,
    SETITEM,
    STACK_GLOBAL,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
)

import pytest
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from tests.helpers.pickle_program import START, dict_of, name_of, number, small_number, text
from tests.helpers.weight_files import safetensors_bytes

LIMIT_BYTES = 2**30
LIMIT_SECONDS = 20

GET_0, GET_1 = BINGET + b"\x00", BINGET + b"\x01"
PUT_0, PUT_1 = BINPUT + b"\x00", BINPUT + b"\x01"
MOVE_TO_0, MOVE_TO_1 = PUT_0 + POP, PUT_1 + POP


def modules(*children: bytes) -> bytes:
    """Push a pickled network, as far as its pickle shows: an object with `_modules`."""
    named = [text(str(i)) + child for i, child in enumerate(children)]
    return OBJECT + EMPTY_DICT + text("_modules") + dict_of(*named) + SETITEM + BUILD


CALL_0_WITH_1 = GET_0 + GET_1 + TUPLE1 + REDUCE + POP
OBJECT = name_of("madeup", "Class") + EMPTY_TUPLE + REDUCE
MANY_TUPLE = MARK + NONE * 200_000 + TUPLE + MOVE_TO_1
MANY_PAIRS = EMPTY_LIST + MARK + (NONE + NONE + TUPLE2) * 100_000 + APPENDS + MOVE_TO_1
MANY_ITEMS = dict_of(*(number(i) + NONE for i in range(200_000))) + MOVE_TO_1
DOUBLING_TUPLE = EMPTY_TUPLE + PUT_0 + (GET_0 + GET_0 + TUPLE2 + PUT_0) * 90
TENSOR = (
    name_of("torch._utils", "_rebuild_tensor_v2")
    + MARK
    + (MARK + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + small_number(1) + TUPLE)
    + BINPERSID
    + small_number(0)  # the offset
    + (small_number(1) + TUPLE1)  # the shape
    + (small_number(1) + TUPLE1)  # the strides
    + NONE
    + NONE
    + TUPLE
    + REDUCE
)


def pickles() -> dict[str, bytes]:
    """Return programs of a megabyte or two that demand far more than that."""
    ten_million_digits = LONG4 + struct.pack("<i", 4 << 20) + b"\x7f" * (4 << 20)
    memo_1_under_many_names = dict_of(*(number(i) + GET_1 for i in range(100_000)))
    return {
        "hash a tuple of 2^90 leaves": dict_of(DOUBLING_TUPLE + small_number(1)),
        "hash an integer of ten million digits": (
            ten_million_digits + MOVE_TO_0 + EMPTY_DICT + (GET_0 + NONE + SETITEM) * 200_000
        ),
        "one dict of 100,000 pairs, 100,000 times": (
            name_of("collections", "OrderedDict") + MOVE_TO_0 + MANY_PAIRS + CALL_0_WITH_1 * 100_000
        ),
        "a call with 200,000 arguments, 200,000 times": (
            name_of("torch", "Size") + MOVE_TO_0 + MANY_TUPLE + (GET_0 + GET_1 + REDUCE + POP) * 190_000
        ),
        "a storage of 200,000 fields, 200,000 times": MANY_TUPLE + (GET_1 + BINPERSID + POP) * 200_000,
        "200,000 attributes, 200,000 times": (
            OBJECT + MOVE_TO_0 + MANY_ITEMS + (GET_0 + GET_1 + BUILD + POP) * 100_000
        ),
        "names of a megabyte": text("x" * (1 << 20)) + MOVE_TO_0 + (GET_0 + GET_0 + STACK_GLOBAL + POP) * 200_000,
        "a deep tuple": EMPTY_TUPLE + TUPLE1 * 900_000,
        "a deep list": EMPTY_LIST * 450_000 + APPEND * 449_999,
        "a deep dict": (EMPTY_DICT + text("")) * 300_000 + NONE + SETITEM * 300_000,
        "deep objects": NONE + (MOVE_TO_0 + OBJECT + EMPTY_DICT + text("") + GET_0 + SETITEM + BUILD) * 90_000,
        "very many dicts": EMPTY_DICT * 990_000,
        "very many sets": EMPTY_SET * 990_000,
        "very many memos": NONE + b"".join(LONG_BINPUT + struct.pack("<I", i) for i in range(990_000)),
        "very many instructions": (NONE + POP) * 1_600_000 + NONE,
        "bytes of 100 GB": BINBYTES8 + struct.pack("<Q", 25 << 32),
        "a memo at two billion": NONE + LONG_BINPUT + struct.pack("<I", 2**31 - 1),
        "a network inside of itself": (
            OBJECT
            + PUT_0
            + (EMPTY_DICT + text("_modules") + (EMPTY_DICT + text("a") + GET_0 + SETITEM) + SETITEM)
            + BUILD
        ),
        "a network of 2^60 modules": NONE + PUT_0 + (POP + modules(GET_0, GET_0) + PUT_0) * 60,
        "one dict under 100,000 names": MANY_ITEMS + memo_1_under_many_names,
        "one network under 100,000 names": modules(*[NONE] * 20_000) + MOVE_TO_1 + memo_1_under_many_names,
        "one tensor under 100,000 names": (
            TENSOR + MOVE_TO_1 + dict_of(*(text(str(i)) + GET_1 for i in range(100_000)))
        ),
    }


def legacy_file(storage_keys: bytes) -> bytes:
    """Return a file in PyTorch's format before 1.6: five pickles, the last of which lists the storages."""
    magic = pickle.dumps(MAGIC_NUMBER, 2) + pickle.dumps(PROTOCOL_VERSION, 2)
    byte_order = START + EMPTY_DICT + text("little_endian") + NEWTRUE + SETITEM + STOP
    return magic + byte_order + START + EMPTY_DICT + STOP + START + storage_keys + STOP


def headers() -> dict[str, bytes]:
    """Return safetensors headers."""
    tensor = {"a": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    entry = b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return {
        "10 GB": safetensors_bytes(tensor),
        "deep": safetensors_bytes(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
        "lists": safetensors_bytes(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        "names": safetensors_bytes(b"{" + b",".join(b'"%d' % i + entry for i in range(60_000)) + b"}"),
        "shapes": safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[' + b"0," * 1_900_000 + b'0],"data_offsets":[0,0]}}'
        ),
    }


PROGRAM = """
import resource, sys, time
import repvgg_jax as rv
import numpy, jax
jax.device_put(numpy.zeros(1)).block_until_ready()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
for path in sys.argv[2:]:
    for tensors_only in (False, True):
        start = time.process_time()
        try:
            rv.load_weights(path, tensors_only=tensors_only)
        except rv.RepVGGError as error:
            print("refused", round(time.process_time() - start, 1), error)
        else:
            print("loaded", 0, path)
"""


def zipped(**records: bytes) -> bytes:
    """Return a file in PyTorch's current format."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


def bombs(large: bool) -> dict[str, bytes]:
    """Return files, of up to 20 kB or larger."""
    programs = {name: program for name, program in pickles().items() if (len(program) > 20_000) == large}
    files = {f"{n}.pth": zipped(**{"data.pkl": START + p + STOP, "data/0": bytes(4)}) for n, p in programs.items()}
    files |= {f"{name}.safetensors": h for name, h in headers().items() if (len(h) > 20_000) == large}
    if large:
        many = {f"data/{i}": b"" for i in range(60_000)}
        return files | {"directory.pth": zipped(**{"data.pkl": START + EMPTY_DICT + STOP}, **many)}
    return files | {"storages.pth": legacy_file(storage_keys=EMPTY_LIST + MARK + DOUBLING_TUPLE + APPENDS)}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="needs a limit on address space")
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "large"])
def test_bombs_are_refused(large, tmp_path):
    for name, content in bombs(large).items():
        (tmp_path / name).write_bytes(content)
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", PROGRAM, str(LIMIT_BYTES), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(files) > 10
    for line in lines:
        verdict, seconds, message = line.split(" ", 2)
        assert verdict == "refused", line
        assert float(seconds) < LIMIT_SECONDS, line
        assert str(tmp_path) in message, line
