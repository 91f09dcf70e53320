"""What the tests of a compiler share: they run where its wheels are, which `make check-gpu` and `check-tpu` install."""

import os

import pytest

from repvgg_jax.errors import ConfigError
from train.targets import Target, compile_devices, find_target, prepare


@pytest.fixture(scope="session")
def target() -> Target:
    """The machine that is compiled for."""
    name = os.environ.get("REPVGG_TARGET")
    if name is None:
        pytest.skip("needs a GPU's or TPU's compiler: make check-gpu, make check-tpu")
    target = find_target(name)
    prepare(target)
    return target


@pytest.fixture(scope="session")
def devices(target: Target) -> list:
    """Its chips."""
    try:
        return compile_devices(target)
    except ConfigError as error:
        pytest.fail(str(error))
