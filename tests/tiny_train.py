"""`python tests/tiny_train.py …`: the command `python -m train.main` with one more variant, small enough for tests."""

from repvgg_jax.cli import run_command
from repvgg_jax.variants import VARIANTS, Variant
from train.main import main

TINY = Variant((1, 1, 2, 1), (8, 8, 8, 16, 16), name="Tiny")
VARIANTS["Tiny"] = TINY

if __name__ == "__main__":
    run_command(main)
