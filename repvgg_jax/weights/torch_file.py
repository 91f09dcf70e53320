"""Reader of PyTorch files, both zip archives (torch 1.6 and later) and the older format, without torch.

The pickles are read by `safe_pickle`, which runs no code. Each declared size is checked against the file's size before
anything of that size is allocated, and tensors are read one at a time from their positions in the file. A hostile file
therefore costs at most its own size plus a few hundred MB of memory. The tests compare this reader with
`torch.load(weights_only=True)`: it gives the same tensors for every valid file and accepts nothing that torch refuses
as unsafe.
"""

import dataclasses
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError, reason_of, shown
from .safe_pickle import PickleError, Reader, RefusedError, TensorRecord
from .tensor_file import (
    BFLOAT16,
    Record,
    Tensor,
    TensorFile,
    check_disjoint,
    contiguous_strides,
    overlaps_itself,
    sizes,
)
from .torch_checkpoint import find_state_dict

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ENCRYPTED, UTF8_NAME = 1, 1 << 11
MAX_PICKLE_BYTES = 64 << 20
MAX_DIRECTORY_BYTES = 4 << 20
"""About fifty thousand records; `zipfile` allocates an object of a few hundred bytes for each."""

Places = Mapping[str, Record]
"""Storage key -> its bytes in the file."""


def read_torch_file(handle: io.FileIO, path: Path, ema: bool = False, tensors_only: bool = False) -> TensorFile:
    """Return the state dict of a PyTorch file.

    Args:
      handle: the open file.
      path: the file's name, for messages.
      ema: return the moving average instead of the trained weights.
      tensors_only: skip objects of unknown classes next to the weights instead of refusing the file.

    Raises:
      WeightsError: the file is damaged, unsafe, or has no state dict.
    """
    handle.seek(0)
    is_zip = handle.read(4) == ZIP_MAGIC
    try:
        root, places = (_read_zip if is_zip else _read_legacy)(handle, Reader(tensors_only))
    except RefusedError as error:
        raise WeightsError(
            f"refused to read {path}: it holds a pickled {shown(error.args[0])}, and restoring that would run code "
            "named in the file. To load only the tensors, which runs no code, use --tensors-only, or in Python "
            "load_weights(…, tensors_only=True)"
        ) from error
    except (zipfile.BadZipFile, struct.error, ValueError, ArithmeticError, RuntimeError, OSError, EOFError) as error:
        raise WeightsError(f"cannot read {path}: not a valid PyTorch file ({shown(reason_of(error))})") from error
    state, notes = find_state_dict(root, path, ema)
    tensors = {key: _locate(record, places, key, path) for key, record in state.items()}
    check_disjoint(tensors, path)
    return TensorFile(path, handle, tensors, notes=notes)


def _read_zip(handle: io.FileIO, reader: Reader) -> tuple[Any, Places]:
    length = handle.seek(0, io.SEEK_END)
    if _directory_bytes(handle, length) > MAX_DIRECTORY_BYTES:
        raise PickleError("its zip directory is absurdly long")
    with zipfile.ZipFile(handle) as archive:
        records = archive.infolist()
    names = {record.filename: record for record in records}
    # With checksums disabled (`torch.serialization.set_crc32_options`), torch.save writes zeros.
    checked = any(record.CRC for record in records)
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != len(records) or len(pickles) != 1:
        raise PickleError("a zip file, but not one of PyTorch")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names or any(name.startswith(f"{folder}code/") for name in names):
        raise PickleError("a TorchScript program; save its state_dict() instead")
    places = {}
    for name, record in names.items():
        if not name.startswith(folder) or record.flag_bits & ENCRYPTED:
            raise PickleError("a zip file, but not one of PyTorch")
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise PickleError("compressed zip records, which PyTorch never writes")
        start = _record_start(handle, record)
        if start + record.file_size > length:
            raise PickleError(f"{shown(name)} declares more bytes than the file has")
        places[name.removeprefix(folder)] = Record(start, record.file_size, record.CRC if checked else None)
    if "byteorder" in places and _checked_bytes(handle, "byteorder", places, limit=16) != b"little":
        raise PickleError("big-endian numbers")
    data = _checked_bytes(handle, "data.pkl", places, limit=MAX_PICKLE_BYTES)
    root = reader.load(io.BytesIO(data))
    return root, {key.removeprefix("data/"): place for key, place in places.items() if key.startswith("data/")}


def _directory_bytes(handle: io.FileIO, length: int) -> int:
    """Return the declared length of the zip directory, to be limited before `zipfile` makes an object of each entry.

    PyTorch ends its files with the directory, the 64-bit end record and its locator (76 bytes), and the end record
    (22 bytes). A file with any other ending, such as a comment, might be read differently by different readers.
    """
    handle.seek(max(0, length - 98))
    tail = handle.read(98).rjust(98, b"\0")
    wide, locator, end = tail[:56], tail[56:76], tail[76:]
    if not end.startswith(b"PK\x05\x06"):
        raise PickleError("no zip directory at its end: cut short?")
    size, offset, end_bytes = *struct.unpack_from("<II", end, 12), 22
    if locator.startswith(b"PK\x06\x07"):
        size, offset, end_bytes = *struct.unpack_from("<QQ", wide, 40), 98
    if offset + size + end_bytes != length:
        raise PickleError("its zip directory is not where it says")
    return size


def _record_start(handle: io.FileIO, record: zipfile.ZipInfo) -> int:
    """Return the offset of a record's data, after its local header, whose name must match the directory's."""
    handle.seek(record.header_offset)
    header = handle.read(30)
    if header[:4] != ZIP_MAGIC:
        raise PickleError("a damaged zip record")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    name = handle.read(name_length).decode("utf-8" if record.flag_bits & UTF8_NAME else "cp437")
    if name != record.orig_filename:
        raise PickleError("a zip record that is not what the directory says")
    return record.header_offset + 30 + name_length + extra_length


def _checked_bytes(handle: io.FileIO, name: str, places: Places, limit: int) -> bytes:
    """Return a whole record after verifying its checksum."""
    record = places[name]
    if record.size > limit:
        raise PickleError(f"a part of {record.size} bytes where at most {limit} make sense")
    handle.seek(record.offset)
    data = handle.read(record.size)
    if record.crc32 is not None and zlib.crc32(data) != record.crc32:
        raise PickleError(f"its {name} is damaged: its CRC-32 does not match; fetch or copy the file again")
    return data


def _read_legacy(handle: io.FileIO, reader: Reader) -> tuple[Any, Places]:
    """Read a legacy file: pickles of magic number, protocol, system, object, storage keys; then each storage."""
    length = handle.seek(0, io.SEEK_END)
    handle.seek(0)
    head = io.BytesIO(handle.read(MAX_PICKLE_BYTES))
    if Reader(tensors_only=True).load(head) != LEGACY_MAGIC:
        raise PickleError("a pickle, but not one of PyTorch")
    if reader.load(head) != LEGACY_PROTOCOL:
        raise PickleError("an unknown format version")
    system = reader.load(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("big-endian numbers")
    root = reader.load(head)
    item_sizes = {storage.key: _numpy_dtype(storage.dtype).itemsize for storage in reader.storages}
    keys = reader.load(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("its list of storages is not a list")
    if sorted(keys) != sorted(storage.key for storage in reader.storages):  # one entry per storage, of a single type
        raise PickleError("its list of storages does not match its tensors")
    places, position = {}, head.tell()
    for key in keys:
        handle.seek(position)
        declared = handle.read(8)  # fewer bytes if the file ends within them
        count = int.from_bytes(declared, "little", signed=True)
        size = count * item_sizes[key]
        if len(declared) < 8 or count < 0 or position + 8 + size > length:
            raise PickleError(f"storage {shown(key)} declares more numbers than the file has")
        places[key] = Record(position + 8, size)
        position += 8 + size
    return root, places


def _numpy_dtype(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def _locate(record: TensorRecord, places: Places, key: str, path: Path) -> Tensor:
    """Return the tensor's location after checking its declared sizes against the file."""
    dtype = _numpy_dtype(record.storage.dtype)
    try:
        shape, strides = sizes(record.size), sizes(record.stride)
        if type(record.offset) is not int or record.offset < 0 or len(shape) != len(strides):
            raise ValueError("its place in the file is invalid")
        if record.storage.key not in places:
            raise ValueError("its numbers are missing")
        place = places[record.storage.key]
        if record.storage.count * dtype.itemsize > place.size:
            numbers = place.size // dtype.itemsize
            raise ValueError(f"it declares {record.storage.count} numbers, the file has {numbers}")
        offset = place.offset + record.offset * dtype.itemsize
        tensor = Tensor(shape, dtype, offset, strides, None if place.crc32 is None else place)
        if record.offset + tensor.span > record.storage.count:
            raise ValueError("it reaches beyond its storage")
        if overlaps_itself(tensor):
            raise ValueError("its elements share storage")
    except ValueError as error:
        raise WeightsError(f"cannot read {path}: {shown(key)} is invalid: {error}") from error
    if tensor.size == 1 or strides == contiguous_strides(shape):
        return dataclasses.replace(tensor, strides=contiguous_strides(shape))
    return tensor
