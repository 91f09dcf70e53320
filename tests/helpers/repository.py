"""The root of the checkout, and real photographs that are not part of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shared_data(name: str) -> Path:
    """Return the path of a photograph file next to the checkout, or skip the test if there is none."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(
            f"{name} is not in shared/data next to the checkout: photographs that cannot be distributed with it"
        )
    return path
