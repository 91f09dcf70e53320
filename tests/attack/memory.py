"""Attack: many calls of a predictor and many loads of a weight file, whose number must not increase resident memory.

`python -m tests.attack.memory`
"""

import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables

from .report import Attack, attempts, finish

SMALL = rv.Variant((1, 2, 2, 1), (8, 16, 32, 64, 128))
STATM = Path("/proc/self/statm")
LIMIT = 16 << 20
"""Bytes by which the process may grow after the first tenth of the calls: allocators settle slowly."""


def resident_bytes() -> int:
    """Return this process's resident memory; Linux only."""
    return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Growth:
    """Resident memory before and after a number of calls, in bytes."""

    calls: int
    before: int
    after: int

    @property
    def bytes(self) -> int:
        """Increase from before to after."""
        return self.after - self.before


def growth_over(action: Callable[[], object], calls: int, warm_up: int) -> Growth:
    """Measure how much memory `calls` calls of `action` leave allocated, after `warm_up` unmeasured ones."""
    for _ in range(warm_up):
        action()
    gc.collect()
    before = resident_bytes()
    for _ in range(calls):
        action()
    gc.collect()
    return Growth(calls, before, resident_bytes())


def predictor_call(batch: int = 4, size: int = 64) -> Callable[[], None]:
    """Return a function that calls one predictor with new images and compares the logits bit for bit."""
    model = rv.create_model(SMALL, 10)
    predict = rv.make_predictor(model, random_variables(model), batch, size)
    images = np.random.default_rng(0).normal(size=(batch + 1, size, size, 3)).astype(np.float32)
    expected = predict(images)

    def call() -> None:
        np.testing.assert_array_equal(predict(images.copy()), expected)

    return call


def load_call(folder: Path, suffix: str = ".safetensors", variant: rv.Variant = SMALL) -> Callable[[], None]:
    """Return a function that loads one weight file and checks one of its values."""
    model = rv.create_model(variant, 10)
    variables = random_variables(model)
    path = folder / f"net{suffix}"
    rv.save_weights(path, model, variables)
    expected = variables["params"]["linear"]["bias"]

    def call() -> None:
        loaded = rv.load_weights(path, variant)[1]
        np.testing.assert_array_equal(loaded["params"]["linear"]["bias"], expected)

    return call


def measured(name: str, action: Callable[[], object], calls: int) -> Attack:
    """Count every call as an attempt, and the growth of memory as one more."""
    attack = Attack(name)

    def counted() -> None:
        with attack.attempt():
            action()

    growth = growth_over(counted, calls, warm_up=max(5, calls // 10))
    attack.note = f"resident memory {growth.before / 1e6:.0f} MB, then {growth.bytes / 1e6:+.1f} MB"
    attack.count(growth.bytes <= LIMIT, attack.note)
    return attack


def main() -> int:
    """Run both measurements."""
    if not STATM.exists():
        print("resident memory is read from /proc, which only Linux has", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        attacks = [
            measured("memory over 5,000 predictor calls", predictor_call(), attempts(5000)),
            measured("memory over 500 loads, safetensors", load_call(Path(folder)), attempts(500)),
            measured("memory over 500 loads, PyTorch", load_call(Path(folder), ".pth"), attempts(500)),
        ]
    return finish(*attacks)


if __name__ == "__main__":
    sys.exit(main())
