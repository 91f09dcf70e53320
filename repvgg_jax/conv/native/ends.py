"""What a net does before and after its convolutions, in C++ (`ends.h`): rounding to bytes, pooling, and the classifier.

XLA's operations run on threads that look for more work for a while, which delays the convolutions: of A0's calls in
INT8, for one image on two cores, a fifth took twice as long.
"""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from . import CLASSIFY, CLASSIFY_INT8, POOL, TO_BYTES, pack_kernel, pack_together, pad_channels

INT8_INPUTS = 4
"""The integer classifier's number of inputs is a multiple of this."""


def round_to_bytes(x: Array, factor: Array, zero: int = 0) -> Array:
    """Return `x * factor`, rounded to nearest with ties to even, plus `zero`, saturated to uint8; NaN becomes `zero`.

    Args:
      x: float32 of any shape.
      factor: float32 scalar.
      zero: 128 for int8 that is shifted to be unsigned.
    """
    call = jax.ffi.ffi_call(TO_BYTES, jax.ShapeDtypeStruct(x.shape, jnp.uint8), vmap_method="sequential")
    return call(x, factor, zero=np.int64(zero))


def average(x: Array, factor: Any = 1.0) -> Array:
    """Return the mean over height and width times `factor`, `[N, H, W, C] -> [N, C]` float32.

    Args:
      x: float32, bfloat16 or uint8, the latter two if the processor has convolutions for them.
      factor: float32 scalar.
    """
    n, height, width, channels = x.shape
    call = jax.ffi.ffi_call(POOL, jax.ShapeDtypeStruct((n, channels), jnp.float32), vmap_method="sequential")
    return call(x, jnp.asarray(factor, jnp.float32) / (height * width))


def pack_classifier(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Return a float32 classifier `[C, classes]` with its bias, packed for `classify`."""
    return {"packed": pack_kernel(kernel[None, None]), "padded_bias": pad_channels(bias, 1)}


def classify(x: Array, packed: Array, bias: Array, classes: int) -> Array:
    """Return the logits `[N, classes]` of float32 `[N, C]`; `packed` and `bias` are from `pack_classifier`."""
    call = jax.ffi.ffi_call(CLASSIFY, jax.ShapeDtypeStruct((len(x), classes), jnp.float32), vmap_method="sequential")
    return call(x, packed, bias)


def pack_int8_classifier(kernel: np.ndarray) -> np.ndarray:
    """Return an int8 classifier `[C, classes]` packed for `classify_int8`; C is a multiple of `INT8_INPUTS`."""
    return pack_together(kernel[None, None], INT8_INPUTS)


def classify_int8(x: Array, packed: Array, bias: Array, factor: Array, classes: int) -> Array:
    """Return `(x @ kernel + bias) * factor`, `[N, classes]` float32, from exact int32 sums.

    Args:
      x: uint8 `[N, C]`.
      packed: from `pack_int8_classifier`.
      bias: int32, from `pad_channels`.
      factor: float32, from `pad_channels`.
      classes: number of classes.
    """
    shape = jax.ShapeDtypeStruct((len(x), classes), jnp.float32)
    return jax.ffi.ffi_call(CLASSIFY_INT8, shape, vmap_method="sequential")(x, packed, bias, factor)
