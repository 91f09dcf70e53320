"""Claim: a small file that asks for endless work or memory is refused in seconds, within a GB, in one line."""

import io
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.weights import safetensors_bytes

LIMIT_BYTES = 2**30
LIMIT_SECONDS = 20

START = b"\x80\x02"
GET_0, GET_1, PUT_0, PUT_1, POP = b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"0"
CALL_0_WITH_1 = GET_0 + GET_1 + b"\x85R" + POP
OBJECT = b"cmadeup\nClass\n)R"
MANY_TUPLE = b"(" + b"N" * 200_000 + b"t" + PUT_1 + POP
MANY_PAIRS = b"](" + b"NN\x86" * 100_000 + b"e" + PUT_1 + POP
MANY_ITEMS = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000)) + b"u" + PUT_1 + POP
DOUBLING_TUPLE = b")" + PUT_0 + (GET_0 + GET_0 + b"\x86" + PUT_0) * 90


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def modules(*children: bytes) -> bytes:
    """A pickled network, as far as its pickle shows: an object with `_modules`."""
    items = b"".join(text(str(i)) + child for i, child in enumerate(children))
    return OBJECT + b"}" + text("_modules") + b"}(" + items + b"usb"


def pickles() -> dict[str, bytes]:
    """Programs of a megabyte or two that ask for far more than that."""
    return {
        "hash a tuple of 2^90 leaves": b"}(" + DOUBLING_TUPLE + b"K\x01u",
        "hash an integer of ten million digits": b"\x8b\x00\x00\x40\x00"
        + b"\x7f" * (4 << 20)
        + PUT_0
        + POP
        + b"}"
        + (GET_0 + b"Ns") * 200_000,
        "one dict of 100,000 pairs, 100,000 times": b"ccollections\nOrderedDict\n"
        + PUT_0
        + POP
        + MANY_PAIRS
        + CALL_0_WITH_1 * 100_000,
        "a call with 200,000 arguments, 200,000 times": b"ctorch\nSize\n"
        + PUT_0
        + POP
        + MANY_TUPLE
        + (GET_0 + GET_1 + b"R" + POP) * 190_000,
        "a storage of 200,000 fields, 200,000 times": MANY_TUPLE + (GET_1 + b"Q" + POP) * 200_000,
        "200,000 attributes, 200,000 times": OBJECT + PUT_0 + POP + MANY_ITEMS + (GET_0 + GET_1 + b"b" + POP) * 100_000,
        "names of a megabyte": text("x" * (1 << 20)) + PUT_0 + POP + (GET_0 + GET_0 + b"\x93" + POP) * 200_000,
        "a deep tuple": b")" + b"\x85" * 900_000,
        "a deep list": b"]" * 450_000 + b"a" * 449_999,
        "a deep dict": (b"}" + text("")) * 300_000 + b"N" + b"s" * 300_000,
        "deep objects": b"N" + (PUT_0 + POP + OBJECT + b"}" + text("") + GET_0 + b"sb") * 90_000,
        "very many dicts": b"}" * 990_000,
        "very many objects": b"\x8f" * 990_000,
        "very many memos": b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(990_000)),
        "very many instructions": b"N0" * 1_600_000 + b"N",
        "a text of 100 GB": b"\x8e\x00\x00\x00\x00\x19\x00\x00\x00",
        "a memo at two billion": b"Nr\xff\xff\xff\x7f",
        "a network inside of itself": OBJECT + PUT_0 + b"}" + text("_modules") + b"}" + text("a") + GET_0 + b"ssb",
        "a network of 2^60 modules": b"N" + PUT_0 + (POP + modules(GET_0, GET_0) + PUT_0) * 60,
        "one dict under 100,000 names": MANY_ITEMS
        + b"}("
        + b"".join(b"J" + struct.pack("<i", i) + GET_1 for i in range(100_000))
        + b"u",
        "one network under 100,000 names": modules(*[b"N"] * 20_000)
        + PUT_1
        + POP
        + b"}("
        + b"".join(b"J" + struct.pack("<i", i) + GET_1 for i in range(100_000))
        + b"u",
        "one tensor under 100,000 names": b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"K\x01tQK\x00K\x01\x85K\x01\x85NNtR"
        + PUT_1
        + POP
        + b"}("
        + b"".join(text(str(i)) + GET_1 for i in range(100_000))
        + b"u",
    }


def legacy_with_storage_list(keys: bytes) -> bytes:
    magic = START + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    return magic + START + b"M\xe9\x03." + START + b"}" + text("little_endian") + b"\x88s." + START + b"}." + keys


def headers() -> dict[str, bytes]:
    """Safetensors headers."""
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
    """A file as PyTorch makes them."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


def bombs(large: bool) -> dict[str, bytes]:
    """Files, of up to 20 kB or larger."""
    programs = {name: program for name, program in pickles().items() if (len(program) > 20_000) == large}
    files = {f"{n}.pth": zipped(**{"data.pkl": START + p + b".", "data/0": bytes(4)}) for n, p in programs.items()}
    files |= {f"{name}.safetensors": h for name, h in headers().items() if (len(h) > 20_000) == large}
    if large:
        many = {f"data/{i}": b"" for i in range(60_000)}
        return files | {"directory.pth": zipped(**{"data.pkl": START + b"}."}, **many)}
    return files | {"storages.pth": legacy_with_storage_list(START + b"](" + DOUBLING_TUPLE + b"e.")}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="needs a limit on address space")
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "large"])
def test_bombs_fizzle(large, tmp_path):
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
