"""`python -m tests.attack.fork`: fork a process after its predictor and training convolutions have run.

A child may not use JAX (its threads stay with the parent, as JAX warns), but it may do anything else: exit, run NumPy,
start another program. The parent's results must not change. A child that has not ended after a minute counts as hung.

Children end with `os._exit`, like those of `multiprocessing`. One that ends with `sys.exit` crashes in JAX's own
cleanup (a segmentation fault, JAX 0.10.2), whether this library was used or not.
"""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import repvgg_jax as rv
from tests.helpers.random_weights import random_variables

from .report import Attack, attempts, finish

SECONDS = 60


def leave_at_once() -> None:
    """Exit without doing anything."""


def use_numpy() -> None:
    """Multiply matrices, which uses the threads of a BLAS."""
    matrix = np.ones((300, 300), np.float32)
    assert (matrix @ matrix == 300).all()


def start_a_program() -> None:
    """Run another program."""
    assert subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, check=True).stdout == b"42\n"


def child_status(act: Callable[[], None]) -> int | None:
    """Fork, let the child act and exit; return its status, or None if it had to be killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns about forking
        child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> int:
    """Fork after inference and after a training step."""
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (16, 16, 16, 16, 16)), 10)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    predict = rv.make_predictor(model, variables, 4, 32)

    def loss(params):
        logits: Any = model.apply(variables | {"params": params}, images, train=False)
        return (logits**2).sum()

    gradients = jax.jit(jax.grad(loss))

    def work() -> list[bytes]:
        return [np.asarray(a).tobytes() for a in (predict(images), *jax.tree.leaves(gradients(variables["params"])))]

    before = work()
    attack = Attack(
        "fork after inference and training: children that exit, use NumPy, start a program; the parent's bits"
    )
    for number in range(attempts(50)):
        for act in (leave_at_once, use_numpy, start_a_program):
            with attack.attempt(f"{act.__name__}, {number}"):
                status = child_status(act)
                assert status == 0, "the child hangs" if status is None else f"the child ended with {status}"
                if act is use_numpy:
                    assert work() == before, "the parent's results have changed"
    sys.stdout.flush()
    return finish(attack)


if __name__ == "__main__":
    sys.exit(main())
