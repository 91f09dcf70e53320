"""Fixtures of the compiler tests, which run only where `make check-gpu` or `make check-tpu` installs a compiler."""

import os

import pytest

from repvgg_jax.errors import ConfigError
from train.targets import Target, compile_devices, find_target, prepare


@pytest.fixture(scope="session")
def target() -> Target:
    """The kind of machine to compile for."""
    name = os.environ.get("REPVGG_TARGET")
    if name is None:
        pytest.skip("needs a GPU's or TPU's compiler: make check-gpu, make check-tpu")
    target = find_target(name)
    prepare(target)
    return target


@pytest.fixture(scope="session")
def devices(target: Target) -> list:
    """The target's chips."""
    try:
        return compile_devices(target)
    except ConfigError as error:
        pytest.fail(str(error))
