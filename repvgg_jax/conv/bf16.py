"""Whether this machine's CPU should compute bfloat16 nets in bfloat16, or in float32 on rounded weights."""

import functools
import time

import jax
import numpy as np
from jax import numpy as jnp

from . import native
from .algorithm import ALGORITHMS, Options

_SIZE, _CHANNELS = 14, 192
"""A layer of RepVGG-A0's longest stage."""


@functools.cache
def pays_on_cpu() -> bool:
    """Return whether the native convolutions are faster in bfloat16 than in float32 on this CPU.

    Without AMX this depends on the processor: some multiply as many numbers per second in either, and in float32
    Winograd may use larger tiles. So one layer is timed in both, once per process, which takes about 0.3 s.
    """
    if not native.bf16_available():
        return False
    return native.bf16_in_tiles() or _seconds("native_bf16_winograd2") < _seconds("native_winograd4")


def _seconds(name: str) -> float:
    """Return the shortest of many times of a layer: a wrong choice is costly, so waking threads must not decide."""
    algorithm = ALGORITHMS[name]
    dtype = jnp.bfloat16 if algorithm.dtypes == ("bfloat16",) else jnp.float32
    options = Options(stride=1, groups=1, dilation=1, relu=True)
    kernel = algorithm.prepare(np.ones((3, 3, _CHANNELS, _CHANNELS), np.float32), 1)
    arguments = jnp.ones((1, _SIZE, _SIZE, _CHANNELS), dtype), jnp.asarray(kernel, dtype), jnp.zeros(_CHANNELS)
    times = []
    with jax.disable_jit(False):
        run = jax.jit(lambda x, packed, bias: algorithm.compute(x, packed, bias, options))
        for _ in range(30):
            begin = time.perf_counter()
            run(*arguments).block_until_ready()
            times.append(time.perf_counter() - begin)
    return min(times)
