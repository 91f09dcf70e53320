"""Fixtures for the tests that run the project's pages."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.helpers.pages import Sandbox, use_small_nets


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> None:
    """Restrict huggingface_hub to the sandbox."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def sandbox(tmp_path, monkeypatch, offline_hub) -> Iterator[Sandbox]:
    """Put small nets under the published names, and make the sandbox's folder the current directory."""
    use_small_nets(monkeypatch)
    monkeypatch.chdir(tmp_path)
    cache_before = jax.config.values["jax_compilation_cache_dir"]  # a page sets it
    yield Sandbox(tmp_path, trains=False)
    jax.config.update("jax_compilation_cache_dir", cache_before)
    compilation_cache.reset_cache()
