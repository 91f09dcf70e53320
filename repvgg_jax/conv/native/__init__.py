"""3x3 convolutions in C++ (`conv3x3.cc`), called by XLA: those compiled in the wheel, or compiled here on first use.

Compiling needs a C++ compiler (`compiler.py`) and the headers that JAX installs. If there is no library, `available`
returns False and XLA's operations are used instead. The convolutions for training are in `training.py`, and a net's
operations before and after its convolutions in `ends.py`.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ...compiler import load_compiled, load_library, switched_on
from ...errors import RepVGGError
from ...processors import CONVOLUTIONS

SOURCE = Path(__file__).parent / "conv3x3.cc"
TARGET, INT8_TARGET, BF16_TARGET = "repvgg_conv3x3", "repvgg_conv3x3_int8", "repvgg_conv3x3_bf16"
TRAINING, INPUT_GRADIENT, KERNEL_GRADIENT = (
    "repvgg_training_conv3x3",
    "repvgg_input_gradient",
    "repvgg_kernel_gradient",
)
POOL, CLASSIFY = "repvgg_pool", "repvgg_classify"
CLASSIFY_INT8, TO_BYTES = "repvgg_classify_int8", "repvgg_to_bytes"
COLOURS = 3
"""Channels of a photograph, for which 8- and 16-bit kernels are packed in a way of their own."""

_log = logging.getLogger(__name__)


def available() -> bool:
    """Return whether these convolutions can be used; compile them if this machine has not done so yet."""
    return switched_on() and _library() is not None


def int8_available() -> bool:
    """Return whether integer convolutions are available: the processor needs AVX-512 VNNI; AMX makes them faster."""
    return _run("int8") > 0


def bf16_available() -> bool:
    """Return whether bfloat16 convolutions are available: the processor needs AVX-512 BF16; AMX makes them faster."""
    return _run("bf16") > 0


def bf16_in_tiles() -> bool:
    """Return whether bfloat16 convolutions use AMX: without it, float32 with Winograd may be faster."""
    library = _library() if bf16_available() else None
    return library is not None and bool(library.repvgg_bf16_in_tiles())


def lanes() -> int:
    """Return the number of output channels in a vector on this machine."""
    library = _library()
    if library is None:
        raise RepVGGError("there are no native convolutions here: no C++ compiler, or it failed")
    return library.repvgg_lanes()


def pack_kernel(matrices: np.ndarray) -> np.ndarray:
    """Return the matrices with their columns in panels of `lanes()`, the last panel padded with zeros.

    Args:
      matrices: the 9 taps of a kernel, or the positions of a Winograd tile, `[groups, P, C_in // groups,
        C_out // groups]`.

    Returns:
      `[groups, panels, P, C_in // groups, lanes]`.
    """
    width = lanes()
    groups, positions, inner, outer = matrices.shape
    padded = np.pad(matrices, ((0, 0), (0, 0), (0, 0), (0, -outer % width)))
    return np.ascontiguousarray(padded.reshape(groups, positions, inner, -1, width).transpose(0, 3, 1, 2, 4))


def convolve(x: Array, packed: Array, bias: Array, *, tile: int, stride: int, groups: int, relu: bool) -> Array:
    """Compute a 3x3 convolution with padding 1, bias and optional ReLU.

    Args:
      x: float32 `[N, H, W, C_in]`.
      packed: from `pack_kernel`.
      bias: `[C_out]`.
      tile: 0 for the direct sum, else Winograd's m (2 or 4), which needs stride 1.
      stride: 1 or 2.
      groups: groups of the convolution.
      relu: whether to apply ReLU.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), bias.size)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    attributes = {"stride": np.int64(stride), "groups": np.int64(groups), "tile": np.int64(tile), "relu": relu}
    return call(x, packed, pad_channels(bias, groups), **attributes)


def pack_int8_kernel(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Return an integer kernel packed for `convolve_int8` (see `_pack_runs`): four input channels side by side.

    Args:
      kernel: int8 `[3, 3, C_in // groups, C_out]`.
      groups: groups of the convolution.
    """
    return _pack_runs(kernel, groups, 4, _run("int8"))


def pack_together(matrices: np.ndarray, together: int) -> np.ndarray:
    """Return `[groups, panels, P, ceil(C_in // groups / together), lanes, together]`, like `pack_kernel`.

    Args:
      matrices: `[groups, P, C_in // groups, C_out // groups]`; dtype unchanged.
      together: number of input channels side by side.
    """
    matrices = np.pad(matrices, ((0, 0), (0, 0), (0, -matrices.shape[2] % together), (0, 0)))
    packed = pack_kernel(matrices)
    split = packed.reshape(*packed.shape[:3], -1, together, packed.shape[-1])
    return np.ascontiguousarray(np.moveaxis(split, 4, 5))


def pack_bf16_matrices(matrices: np.ndarray) -> np.ndarray:
    """Return the positions of a Winograd tile packed for `convolve_bf16`, dtype unchanged: channels in pairs.

    Args:
      matrices: `[groups, P, C_in // groups, C_out // groups]`.
    """
    return pack_together(matrices, 2)


def pack_bf16_kernel(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Return a kernel packed for `convolve_bf16` (see `_pack_runs`), dtype unchanged: two input channels side by side.

    Args:
      kernel: `[3, 3, C_in // groups, C_out]`.
      groups: groups of the convolution.
    """
    return _pack_runs(kernel, groups, 2, _run("bf16"))


def _pack_runs(kernel: np.ndarray, groups: int, together: int, run: int) -> np.ndarray:
    """Return the kernel as `[groups, panels, runs, length // together, lanes, together]`, padded with zeros.

    A run holds the weights of adjacent pixels: of three in a row, of a single one if there are groups, or of all nine
    pixels if they have three channels. Its length is padded to a multiple of `run`, and, except in the last case, each
    pixel's part to a multiple of `together`.
    """
    width = lanes()
    _, _, inner, outputs = kernel.shape
    parts = kernel.reshape(9, inner, groups, outputs // groups).transpose(2, 0, 1, 3)
    gathered = groups == 1 and inner == COLOURS
    parts = np.pad(parts, ((0, 0), (0, 0), (0, 0 if gathered else -inner % together), (0, -parts.shape[3] % width)))
    runs = 1 if gathered else 3 if groups == 1 else 9
    parts = parts.reshape(groups, runs, -1, parts.shape[3])
    parts = np.pad(parts, ((0, 0), (0, 0), (0, -parts.shape[2] % run), (0, 0)))
    split = parts.reshape(groups, parts.shape[1], parts.shape[2] // together, together, -1, width)
    return np.ascontiguousarray(split.transpose(0, 4, 1, 2, 5, 3))


def pad_channels(values: Any, groups: int) -> Any:
    """Return `[C_out]` with each group's channels zero-padded to whole vectors, as in a packed kernel."""
    by_group = values.reshape(groups, -1)
    pad = jnp.pad if isinstance(values, Array) else np.pad
    return pad(by_group, ((0, 0), (0, -by_group.shape[1] % lanes()))).reshape(-1)


def supports_int8(in_channels: int, groups: int) -> bool:
    """Return whether the integer convolution supports the layer: with groups, each needs a multiple of 4 inputs."""
    return groups == 1 or in_channels // groups % 4 == 0


def supports_bf16(in_channels: int, groups: int) -> bool:
    """Return whether the bfloat16 convolution supports the layer: with groups, each needs an even number of inputs."""
    return groups == 1 or in_channels // groups % 2 == 0


def convolve_bf16(x: Array, packed: Array, bias: Array, *, tile: int, stride: int, groups: int, relu: bool) -> Array:
    """Compute a 3x3 convolution in bfloat16 with float32 sums, padding 1, bias and optional ReLU.

    With AMX tiles, an infinite or NaN pixel turns its neighbours in the same row into NaN; with Winograd, its tile.

    Args:
      x: bfloat16 `[N, H, W, C_in]`.
      packed: from `pack_bf16_kernel` or, for Winograd, `pack_bf16_matrices`.
      bias: `[C_out]`.
      tile: 0 for the direct sum, else Winograd's m, which must be 2 and needs stride 1.
      stride: 1 or 2.
      groups: groups of the convolution.
      relu: whether to apply ReLU.

    Returns:
      bfloat16 `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), bias.size)
    call = jax.ffi.ffi_call(BF16_TARGET, jax.ShapeDtypeStruct(shape, jnp.bfloat16), vmap_method="sequential")
    padded = pad_channels(bias.astype(jnp.float32), groups)
    attributes = {"stride": np.int64(stride), "groups": np.int64(groups), "tile": np.int64(tile), "relu": relu}
    return call(x, packed.astype(jnp.bfloat16), padded, **attributes)


def convolve_int8(
    x: Array,
    packed: Array,
    bias: Array,
    factor: Array,
    *,
    outputs: int,
    stride: int,
    groups: int,
    zero: int,
    dtype: Any,
) -> Array:
    """Compute a 3x3 convolution of bytes with int32 sums, padding 1.

    Args:
      x: uint8 `[N, H, W, C_in]`.
      packed: from `pack_int8_kernel`.
      bias: int32, from `pad_channels`.
      factor: float32, from `pad_channels`: each sum is multiplied by it before rounding to uint8.
      outputs: `C_out`.
      stride: 1 or 2.
      groups: groups of the convolution.
      zero: the integer that represents zero, used for the padding.
      dtype: uint8 for rounded and saturated results, int32 for sums.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]` in `dtype`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), outputs)
    call = jax.ffi.ffi_call(INT8_TARGET, jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
    return call(x, packed, bias, factor, stride=np.int64(stride), groups=np.int64(groups), zero=np.int64(zero))


def _run(kind: Literal["int8", "bf16"]) -> int:
    """Return the multiple to which runs of packed weights are padded, in elements; 0 if `kind` is not available."""
    library = _library() if available() else None
    return 0 if library is None else getattr(library, f"repvgg_{kind}_run")()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the library, with its functions registered with XLA; None if there is none."""
    library = load_compiled(SOURCE)
    if library is not None:
        try:
            jax.local_devices(backend="cpu")  # without a backend, XLA accepts any function and may reject it later
            _register(library)
            return library
        except Exception as error:  # jaxlib's exception for an unsupported FFI version
            _log.warning("XLA rejects the wheel's compiled convolutions, so they are not used: %s", error)
    library = load_library(SOURCE, "convolutions", *CONVOLUTIONS, jax.ffi.include_dir())
    if library is not None:
        _register(library)
    return library


def _register(library: ctypes.CDLL) -> None:
    """Register the library's functions with XLA."""
    targets = [TARGET, TRAINING, INPUT_GRADIENT, KERNEL_GRADIENT, POOL, CLASSIFY]
    if library.repvgg_int8_run():
        targets += [INT8_TARGET, CLASSIFY_INT8, TO_BYTES]
    if library.repvgg_bf16_run():
        targets.append(BF16_TARGET)
    for target in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
