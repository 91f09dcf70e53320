"""Attack: one predictor called from many threads at once, where every result must be bit for bit that of a single call.

`python -m tests.attack.threads`
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import repvgg_jax as rv
from repvgg_jax.inference.predictor import Predictor
from tests.helpers.random_weights import random_variables

from .report import Attack, attempts, finish

THREADS = 32
SIZE = 32
VARIANT = rv.Variant((1, 2, 2, 1), (8, 16, 32, 64, 128))
GATED = rv.Variant((1, 1, 1, 1), (8, 16, 32, 64, 128), groups=2, squeeze_excite="before_relu", squeeze_excite_ratio=4)


def predictors() -> Iterator[tuple[str, Predictor]]:
    """Yield each kind of predictor with its name; all take float images of `SIZE` pixels."""
    for name, variant in (("plain", VARIANT), ("grouped, gated", GATED)):
        model = rv.create_model(variant, 10)
        variables = random_variables(model)
        yield name, rv.make_predictor(model, variables, 4, SIZE)
        yield f"{name}, embedding", rv.make_predictor(model, variables, 3, SIZE, output="embedding")
        images = np.random.default_rng(1).normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
        net = rv.quantize(*rv.to_deploy(model, variables), images, "per-channel")
        yield f"{name}, INT8", rv.make_predictor(quantized=net, batch_size=4, image_size=SIZE)


def attacked(name: str, predict: Predictor, calls: int, threads: int = THREADS) -> Attack:
    """Call `predict` from `threads` threads with batches of 1 to 9 images, and compare with results computed before."""
    attack = Attack(f"{threads} threads on one predictor: {name}")
    rng = np.random.default_rng(2)
    batches = [rng.normal(size=(1 + i % 9, SIZE, SIZE, 3)).astype(np.float32) for i in range(36)]
    alone = [predict(batch) for batch in batches]
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda i: predict(batches[i % len(batches)]), range(calls))
        for i, result in enumerate(results):
            attack.count(np.array_equal(result, alone[i % len(batches)]), f"call {i}")
    return attack


def main() -> int:
    """Attack every kind of predictor."""
    return finish(*(attacked(name, predict, attempts(2000)) for name, predict in predictors()))


if __name__ == "__main__":
    sys.exit(main())
