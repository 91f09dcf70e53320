"""Console commands that `pip install` creates: `repvgg`, `repvgg-train`, `repvgg-evaluate` and `repvgg-convert`.

Training and conversion are applications next to the library, in the top-level packages `train` and `convert`. A wheel
should not install packages with such general names, so it omits them. These commands find them in the checkout that an
editable install points to, from any working directory.
"""

import sys
from pathlib import Path

from .cli import run_module
from .errors import RepVGGError


def repvgg() -> None:
    """Run `python -m repvgg_jax`."""
    run_module("repvgg_jax.__main__")


def train() -> None:
    """Run `python -m train.main`."""
    _run_of_checkout("train.main", huge_pages=True)


def evaluate() -> None:
    """Run `python -m train.evaluate`."""
    _run_of_checkout("train.evaluate")


def convert() -> None:
    """Run `python -m convert`."""
    _run_of_checkout("convert.__main__")


def _run_of_checkout(module: str, *, huge_pages: bool = False) -> None:
    def find_checkout() -> None:
        checkout = Path(__file__).resolve().parent.parent
        if not (checkout / "train" / "main.py").exists() or not (checkout / "pyproject.toml").exists():
            name = module.removesuffix(".__main__")
            raise RepVGGError(
                f"{Path(sys.argv[0]).name} runs python -m {name} of a checkout, and this installation has none: "
                "in a checkout, run pip install -e '.[train]'"
            )
        sys.path.insert(0, str(checkout))  # first, since other packages may have these names

    run_module(module, find_checkout, huge_pages=huge_pages)
