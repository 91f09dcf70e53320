"""`python -m tests.helpers.tiny_train …`: `python -m train.main` with one more variant, small enough for tests."""

if __name__ == "__main__":
    from repvgg_jax.cli import run_module

    run_module("tests.helpers.tiny_train")

import train.main
from repvgg_jax.net.variants import VARIANTS, Variant

TINY = Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), name="Tiny")
VARIANTS["Tiny"] = TINY


def main() -> None:
    """The command."""
    train.main.main()
