"""The native weight file: `.safetensors` with the parameter tree's names and a self-describing header.

Tensors are named as in the parameter tree (`params/stage1_0/rbr_dense/conv/kernel`), kernels HWIO. The header's
metadata holds one JSON object under `repvgg_jax`, with a CRC-32 for each tensor, and the CRC-32 of that object under
`repvgg_jax_crc32`. Files of the first releases have no checksums.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..net.layout import stem_kernel
from ..net.leaves import Shape
from ..net.variants import Variant
from ..trees import flatten
from .header import INT8, IS_DEPLOY, Header, integer, refusing_damage
from .info import WeightsInfo
from .safetensors_file import write_safetensors
from .tensor_file import Record, Tensor, TensorFile

FAMILY = "native"
HEADER = "repvgg_jax"
HEADER_CRC32 = "repvgg_jax_crc32"


def write(path: str | os.PathLike, header: Header, variables: Mapping[str, Any]) -> None:
    """Write a tree of arrays to `path`, atomically.

    Raises:
      RepVGGError: the file cannot be written.
    """
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in flatten(variables).items()}
    checksums = {
        name: zlib.crc32(array.reshape(-1).view(np.uint8).data, _crc32_start(array.dtype, array.shape))
        for name, array in arrays.items()
    }
    text = json.dumps(header.to_json() | {"crc32": checksums})
    write_safetensors(path, arrays, {HEADER: text, HEADER_CRC32: str(zlib.crc32(text.encode()))})


def _crc32_start(dtype: np.dtype, shape: Shape) -> int:
    """Return the initial value of a tensor's CRC-32, so that the checksum covers dtype and shape too."""
    return zlib.crc32(f"{dtype.name} {list(shape)}".encode())


def read_info(file: TensorFile, expected: Variant | None = None) -> WeightsInfo | None:
    """Return the description in a native file's header; None if it is a safetensors file of another family.

    Adds the header's checksums to `file.tensors`, so that later reads are verified.

    Args:
      file: the open file.
      expected: supplies the activation if it is a function, which a file cannot hold.

    Raises:
      WeightsError: the header is damaged or of a later release, or the activation is unknown.
    """
    text = file.metadata.get(HEADER)
    if text is None:
        return None
    with refusing_damage(f"cannot read {file.path}: damaged header"):
        if zlib.crc32(text.encode()) != int(file.metadata.get(HEADER_CRC32, zlib.crc32(text.encode()))):
            raise ValueError("its CRC-32 does not match; fetch or copy the file again")
        fields = json.loads(text)
        header = Header.from_json(fields, f"{file.path}", len(file.tensors), expected)
        quantized, kernel = header.form == INT8, stem_kernel(file.tensors)
        if kernel is None:
            raise KeyError("stage0's kernel")
        if "crc32" in fields:
            file.tensors = _with_checksums(file.tensors, fields["crc32"])
        return WeightsInfo(
            family=FAMILY,
            variant=header.variant,
            deploy=IS_DEPLOY[header.form],
            quantized=quantized,
            num_classes=header.num_classes,
            in_channels=kernel.shape[2],
            dtype="int8" if quantized else kernel.dtype.name,
            num_parameters=sum(t.size for name, t in file.tensors.items() if _is_parameter(name)),
            preprocessing=header.preprocessing,
            class_names=header.class_names,
            num_batches_tracked=header.num_batches_tracked,
        )


def _with_checksums(tensors: Mapping[str, Tensor], checksums: Mapping[str, Any]) -> dict[str, Tensor]:
    if checksums.keys() != tensors.keys():
        raise ValueError("checksums of other tensors")

    def with_checksum(name: str, tensor: Tensor) -> Tensor:
        crc32, start = integer(checksums[name], largest=2**32 - 1), _crc32_start(tensor.dtype, tensor.shape)
        record = Record(tensor.offset, tensor.size * tensor.dtype.itemsize, crc32, start)
        return dataclasses.replace(tensor, record=record)

    return {name: with_checksum(name, tensor) for name, tensor in tensors.items()}


def _is_parameter(name: str) -> bool:
    """Return whether a tensor is a learned parameter, not a running statistic or a scale."""
    return name.startswith("params/") and not name.endswith(("/kernel_scale", "/input_scale"))
