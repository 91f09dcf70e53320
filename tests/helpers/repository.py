"""Where the checkout lies, and the real photographs that are not part of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shared_data(name: str) -> Path:
    """Return a file of photographs beside the checkout; skip the test where there is none."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not in shared/data beside the checkout: photographs that cannot be handed on with it")
    return path
