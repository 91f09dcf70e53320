"""Reading and writing safetensors files: an 8-byte length, a JSON header, and the tensors' data.

The safetensors library validates the file first. The header is then parsed again here for the tensors' offsets, so
that tensors are read one at a time, as in every other format.
"""

import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import WeightsError, reason_of, shown
from ..files import atomic_path
from .tensor_file import BFLOAT16, Tensor, TensorFile, check_disjoint, contiguous_strides, sizes

MAX_HEADER_BYTES = 4 << 20

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": BFLOAT16,
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


def read_safetensors(handle: io.FileIO, path: Path) -> TensorFile:
    """Return the tensors and the metadata of an open safetensors file.

    Raises:
      WeightsError: the file is damaged or truncated, or its header contradicts its contents.
    """
    try:
        length = handle.seek(0, 2)
        handle.seek(0)
        (count,) = struct.unpack("<Q", handle.read(8))
        if count > min(MAX_HEADER_BYTES, length - 8):
            raise ValueError(f"its header claims {count} bytes in a file of {length}")
        with safe_open(path, framework="numpy"):
            pass
        header = json.loads(handle.read(count).decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _locate(entry, 8 + count, length) for name, entry in header.items()}
    except (SafetensorError, struct.error, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read {path}: not a valid safetensors file ({shown(reason_of(error))})") from error
    except RecursionError as error:
        raise WeightsError(f"cannot read {path}: not a valid safetensors file (nested header)") from error
    check_disjoint(tensors, path)
    return TensorFile(path, handle, tensors, metadata)


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically.

    Raises:
      RepVGGError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        save_arrays(temporary, arrays, metadata)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to a temporary path.

    Raises:
      OSError: the file cannot be written.
    """
    try:
        save_file(dict(arrays), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(reason_of(error)) from error


def _locate(entry: dict[str, Any], start: int, length: int) -> Tensor:
    shape, dtype = sizes(entry["shape"]), DTYPES.get(entry["dtype"])
    begin, end = sizes(entry["data_offsets"])
    if dtype is None:
        raise ValueError(f"tensors of type {shown(entry['dtype'])} are not weights")
    tensor = Tensor(shape, dtype, start + begin, contiguous_strides(shape))
    if end - begin != tensor.size * dtype.itemsize or start + end > length:
        raise ValueError("a tensor's shape and place do not agree")
    return tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return entries
