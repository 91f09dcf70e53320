"""3x3 convolutions in C++ (`conv3x3.cc`), called by XLA: compiled for this machine the first time they are needed.

They need a C++ compiler (`compiler.py`) and what JAX installs; without, `available` is False and everything runs on
XLA's own operations. Training has its own, in `training.py`.
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

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether these convolutions can be used; compiles them if that has not been done on this machine."""
    return switched_on() and _library() is not None


def int8_available() -> bool:
    """Whether there are integer convolutions too: the processor needs AVX-512 VNNI; AMX makes them faster."""
    return _run("int8") > 0


def bf16_available() -> bool:
    """Whether there are convolutions in bfloat16 too: the processor needs AVX-512 BF16; AMX makes them faster."""
    return _run("bf16") > 0


def lanes() -> int:
    """Output channels in a vector of this machine."""
    library = _library()
    if library is None:
        raise RepVGGError("there are no native convolutions here: no C++ compiler, or it failed")
    return library.repvgg_lanes()


def pack_kernel(matrices: np.ndarray) -> np.ndarray:
    """Matrices with their columns in panels of `lanes()`, zeros in what the last one has too many.

    Args:
      matrices: `[groups, P, C_in // groups, C_out // groups]`: the 9 taps of a kernel, or the positions of a Winograd
        tile.

    Returns:
      `[groups, panels, P, C_in // groups, lanes]`.
    """
    width = lanes()
    groups, positions, inner, outer = matrices.shape
    padded = np.pad(matrices, ((0, 0), (0, 0), (0, 0), (0, -outer % width)))
    return np.ascontiguousarray(padded.reshape(groups, positions, inner, -1, width).transpose(0, 3, 1, 2, 4))


def convolve(x: Array, packed: Array, bias: Array, *, tile: int, stride: int, groups: int, relu: bool) -> Array:
    """3x3 convolution with padding 1, bias and, where asked for, ReLU.

    Args:
      x: float32 `[N, H, W, C_in]`.
      packed: from `pack_kernel`.
      bias: `[C_out]`.
      tile: 0 for the direct sum, else Winograd's m (2 or 4), with stride 1.
      stride: 1 or 2.
      groups: groups of the convolution.
      relu: apply it.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), bias.size)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    attributes = {"stride": np.int64(stride), "groups": np.int64(groups), "tile": np.int64(tile), "relu": relu}
    return call(x, packed, pad_channels(bias, groups), **attributes)


def pack_int8_kernel(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Return an integer kernel as `convolve_int8` wants it, see `_pack_runs`: four input channels side by side.

    Args:
      kernel: int8 `[3, 3, C_in // groups, C_out]`.
      groups: groups of the convolution.
    """
    return _pack_runs(kernel, groups, 4, _run("int8"))


def pack_bf16_kernel(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Return a kernel as `convolve_bf16` wants it, in its own dtype, see `_pack_runs`: two channels side by side.

    Args:
      kernel: `[3, 3, C_in // groups, C_out]`.
      groups: groups of the convolution.
    """
    return _pack_runs(kernel, groups, 2, _run("bf16"))


def _pack_runs(kernel: np.ndarray, groups: int, together: int, run: int) -> np.ndarray:
    """`[groups, panels, runs, length // together, lanes, together]`, zeros in what has too many.

    A run are the weights of the pixels that lie beside each other: of a row's three, or of one where there are groups.
    Its length is a multiple of `run`, each pixel's of `together`.
    """
    width = lanes()
    _, _, inner, outputs = kernel.shape
    parts = kernel.reshape(9, inner, groups, outputs // groups).transpose(2, 0, 1, 3)
    parts = np.pad(parts, ((0, 0), (0, 0), (0, -inner % together), (0, -parts.shape[3] % width)))
    parts = parts.reshape(groups, 3 if groups == 1 else 9, -1, parts.shape[3])
    parts = np.pad(parts, ((0, 0), (0, 0), (0, -parts.shape[2] % run), (0, 0)))
    split = parts.reshape(groups, parts.shape[1], parts.shape[2] // together, together, -1, width)
    return np.ascontiguousarray(split.transpose(0, 4, 1, 2, 5, 3))


def pad_channels(values: Any, groups: int) -> Any:
    """`[C_out]` with each group's channels filled up to whole vectors with zeros, as a packed kernel has them."""
    by_group = values.reshape(groups, -1)
    pad = jnp.pad if isinstance(values, Array) else np.pad
    return pad(by_group, ((0, 0), (0, -by_group.shape[1] % lanes()))).reshape(-1)


def supports_int8(in_channels: int, groups: int) -> bool:
    """Whether the integer convolution takes that many input channels: groups must be whole fours of them."""
    return groups == 1 or in_channels // groups % 4 == 0


def supports_bf16(in_channels: int, groups: int) -> bool:
    """Whether the convolution in bfloat16 takes that many input channels: groups must be whole pairs of them."""
    return groups == 1 or in_channels // groups % 2 == 0


def convolve_bf16(x: Array, packed: Array, bias: Array, *, stride: int, groups: int, relu: bool) -> Array:
    """3x3 convolution of bfloat16 with float32 sums, padding 1, bias and, where asked for, ReLU.

    A pixel that is infinite or not a number makes those beside it in its row not numbers, where there are tiles (AMX).

    Args:
      x: `[N, H, W, C_in]`.
      packed: from `pack_bf16_kernel`.
      bias: `[C_out]`.
      stride: 1 or 2.
      groups: groups of the convolution.
      relu: apply it.

    Returns:
      bfloat16 `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), bias.size)
    call = jax.ffi.ffi_call(BF16_TARGET, jax.ShapeDtypeStruct(shape, jnp.bfloat16), vmap_method="sequential")
    padded = pad_channels(bias.astype(jnp.float32), groups)
    return call(x, packed.astype(jnp.bfloat16), padded, stride=np.int64(stride), groups=np.int64(groups), relu=relu)


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
    """3x3 convolution of bytes with int32 sums, padding 1.

    Args:
      x: uint8 `[N, H, W, C_in]`.
      packed: from `pack_int8_kernel`.
      bias: int32, from `pad_channels`.
      factor: float32, from `pad_channels`: what a sum is multiplied by before it is rounded to uint8.
      outputs: `C_out`.
      stride: 1 or 2.
      groups: groups of the convolution.
      zero: the integer that stands for zero around the image.
      dtype: uint8 for rounded and saturated results, int32 for sums.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]` of that dtype.
    """
    n, height, width, _ = x.shape
    shape = (n, -(-height // stride), -(-width // stride), outputs)
    call = jax.ffi.ffi_call(INT8_TARGET, jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
    return call(x, packed, bias, factor, stride=np.int64(stride), groups=np.int64(groups), zero=np.int64(zero))


def _run(kind: Literal["int8", "bf16"]) -> int:
    """To a multiple of how many elements a run of packed weights is filled up; 0 where there is no such function."""
    library = _library() if available() else None
    return 0 if library is None else getattr(library, f"repvgg_{kind}_run")()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the library, its functions registered with XLA; None where there is none."""
    library = load_compiled(SOURCE)
    if library is not None:
        try:
            jax.local_devices(backend="cpu")  # before it is there, XLA only notes what it may refuse later
            _register(library)
            return library
        except Exception as error:  # jaxlib's own, for an interface that it does not support
            _log.warning("the convolutions of the wheel are not used, XLA refuses them: %s", error)
    library = load_library(SOURCE, "convolutions", *CONVOLUTIONS, jax.ffi.include_dir())
    if library is not None:
        _register(library)
    return library


def _register(library: ctypes.CDLL) -> None:
    """Register the library's functions with XLA."""
    targets = [TARGET, TRAINING, INPUT_GRADIENT, KERNEL_GRADIENT]
    targets += [INT8_TARGET] * (library.repvgg_int8_run() > 0) + [BF16_TARGET] * (library.repvgg_bf16_run() > 0)
    for target in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
