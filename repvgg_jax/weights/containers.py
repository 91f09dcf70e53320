"""Opening weight files of any format, which is detected from the first bytes, not from the suffix."""

import io
import stat
from pathlib import Path

from ..errors import WeightsError, system_errors
from .safetensors_file import read_safetensors
from .tensor_file import TensorFile
from .torch_file import PICKLE_MAGIC, ZIP_MAGIC, read_torch_file


def open_file(local: Path, where: str) -> io.FileIO:
    """Open a file unbuffered, since each tensor is read in one piece.

    Raises:
      WeightsError: the file does not exist or cannot be opened.
    """
    with system_errors(WeightsError, f"cannot read {where}", ValueError):  # a name with a NUL
        try:
            mode = local.stat().st_mode
            if stat.S_ISDIR(mode):
                raise WeightsError(f"{where} is a folder, not a weight file")
            if not stat.S_ISREG(mode):  # a pipe or a device may never end
                raise WeightsError(f"{where} is not an ordinary file")
            return local.open("rb", buffering=0)
        except FileNotFoundError:
            raise WeightsError(f"{where} does not exist") from None


def read_container(handle: io.FileIO, path: Path, ema: bool, tensors_only: bool) -> TensorFile:
    """Return the tensors of an open file.

    Raises:
      WeightsError: the file is damaged, unsafe, or not a weight file.
    """
    with system_errors(WeightsError, f"cannot read {path}"):
        start = handle.read(512)
    if start[8:9] == b"{":
        if ema:
            raise WeightsError(f"{path} has no moving average (EMA) of the weights: safetensors files hold one model")
        return read_safetensors(handle, path)
    if start[:4] == ZIP_MAGIC or start[:1] == PICKLE_MAGIC:
        return read_torch_file(handle, path, ema, tensors_only)
    raise WeightsError(f"cannot read {path}: {_what_else(start, path)}")


EXPORTS = {".onnx": "an ONNX export", ".stablehlo": "a StableHLO export (jax.export)"}


def _what_else(start: bytes, path: Path) -> str:
    """Describe a file that is not a weight file, and say what to do."""
    if not start:
        return "the file is empty"
    export = EXPORTS.get(path.suffix.lower()) or _export(start)
    if export:
        return f"{export}, for another runtime, not weights; give the weight file that it was made from"
    if start.lstrip()[:1] == b"<":
        return "a web page, not weights; did the download ask for a confirmation?"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves; run git lfs pull"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    return "neither a safetensors nor a PyTorch file"


def _export(start: bytes) -> str:
    """Describe an exported file of ours by its first bytes; empty if it is not one."""
    # jax.export writes a flatbuffer: offset of the root table, then a field table that fills the space up to it.
    if start[1:4] == bytes(3) and start[4:6] == bytes((start[0] - 4 & 255, 0)):
        return EXPORTS[".stablehlo"]
    # ONNX files are protocol buffers: field 1 (the format's version, in one byte), then field 2 (the producer's name).
    if start[:1] == b"\x08" and start[2:3] == b"\x12":
        return EXPORTS[".onnx"]
    return ""
