"""Claim: a written file has the permissions that `open` gives, or those of the file that it replaces."""

import os
from pathlib import Path

import pytest

import repvgg_jax as rv
from repvgg_jax.files import atomic_path
from tests.helpers.random_weights import random_variables

TINY = rv.Variant(num_blocks=(1, 1, 1, 1), widths=(8, 8, 8, 8, 8))


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def colleagues_may_read():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("colleagues_may_read")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_files_get_the_usual_permissions(suffix, tmp_path):
    model = rv.create_model(TINY, 3)
    path = tmp_path / f"w{suffix}"
    rv.save_weights(path, model, random_variables(model), family="timm" if suffix == ".pth" else None)
    assert permissions(path) == 0o644
    path.chmod(0o640)
    rv.save_weights(path, model, random_variables(model), family="timm" if suffix == ".pth" else None)
    assert permissions(path) == 0o640


@pytest.mark.usefixtures("colleagues_may_read")
def test_every_file_gets_the_usual_permissions(tmp_path):
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("a", encoding="utf-8")
        temporary.chmod(0o600)  # as some writers do
    assert permissions(tmp_path / "a.txt") == 0o644
    with atomic_path(tmp_path / "secret", mode=0o600) as temporary:
        temporary.write_text("a", encoding="utf-8")
    assert permissions(tmp_path / "secret") == 0o600
