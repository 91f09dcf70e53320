"""Claim: calls and loads do not leak memory, and threads that share a predictor get the same bits.

The short form of `tests/attack/memory.py` and `tests/attack/threads.py`: what could leak is made so large that nothing
else in the process comes near it.
"""

import jax
import pytest

import repvgg_jax as rv
from tests.attack.memory import STATM, Growth, growth_over, load_call, predictor_call
from tests.attack.threads import attacked, predictors

LARGE = rv.Variant((1, 1, 1, 1), (32, 32, 64, 128, 512))

linux_only = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from Linux's /proc")


@pytest.mark.slow
@linux_only
def test_predictor_calls_do_not_leak():
    call = predictor_call(batch=8, size=128)
    images = 9 * 128 * 128 * 3 * 4
    call()
    arrays = len(jax.live_arrays())
    growth = growth_over(call, calls=150, warm_up=10)
    assert len(jax.live_arrays()) == arrays
    assert growth.bytes < growth.calls * images / 4


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_loads_do_not_leak(suffix, tmp_path):
    call = load_call(tmp_path, suffix, LARGE)
    size = (tmp_path / f"net{suffix}").stat().st_size
    assert size > 3_000_000
    call()
    arrays = len(jax.live_arrays())
    growth = growth_over(call, calls=60, warm_up=5)
    assert len(jax.live_arrays()) == arrays
    assert growth.bytes < growth.calls * size / 4


@linux_only
def test_a_leak_is_detected():
    kept: list[bytes] = []
    growth = growth_over(lambda: kept.append(b"x" * (1 << 20)), calls=50, warm_up=1)
    assert isinstance(growth, Growth)
    assert growth.bytes > growth.calls * (1 << 20) / 2


@pytest.mark.parametrize("kind", ["plain", "plain, INT8"])
def test_threads_get_the_same_bits_as_a_single_call(kind):
    predict = next(predict for name, predict in predictors() if name == kind)
    attack = attacked(kind, predict, calls=300, threads=16)
    assert (attack.survived, attack.failures) == (300, [])
