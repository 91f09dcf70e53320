"""Conversion: `python -m convert IN OUT -a NAME` turns training-form weights into deploy-form ones.

Suffixes choose the formats.
"""

import dataclasses
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.errors import FusionError, WeightsError
from repvgg_jax.weights import inspect_weights, save_weights

TOLERANCE = 1e-4
"""Largest relative difference between the forms' logits that is still float32 rounding, in the deepest nets."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Fuse a training-form weight file into a deploy-form one."""

    input: tyro.conf.Positional[str]
    """Weight file to read."""
    output: tyro.conf.Positional[str]
    """Weight file to write."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Variant the file must hold."""
    keep_training_form: bool = False
    """Rewrite the weights in another format without fusing them."""


def relative_difference(model: rv.RepVGG, variables, other: rv.RepVGG, other_variables) -> float:
    """`||a - b|| / ||a||` of two models' logits on one random batch, at the smallest size that fills the net."""
    channels = jax.tree.leaves(variables["params"]["stage0"]["rbr_dense"]["conv"])[0].shape[2]
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, channels))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(model.apply)(variables, images)
        found = jax.jit(other.apply)(other_variables, images)
    assert isinstance(expected, jax.Array) and isinstance(found, jax.Array)
    return float(jnp.linalg.norm(expected - found) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))


def convert(arguments: Arguments) -> str:
    """Do what `arguments` ask for, and say in one line what was done.

    Raises:
      WeightsError: unreadable input, or a fused net that differs from the training form.
      FusionError: the input is in deploy form already.
    """
    info = inspect_weights(arguments.input)
    model, variables = rv.load_weights(arguments.input, arguments.arch)
    done = "training form kept"
    if not arguments.keep_training_form:
        if model.deploy:
            raise FusionError(f"{arguments.input} is in deploy form already")
        fused_model, fused = rv.to_deploy(model, variables)
        difference = relative_difference(model, variables, fused_model, fused)
        if not difference <= TOLERANCE:
            raise WeightsError(
                f"the fused net differs from the training form by {difference:.2e} (relative); nothing written. "
                "Float32 cannot hold these weights: are they those of a finished training?"
            )
        model, variables, done = fused_model, fused, f"fused, relative difference {difference:.1e} on a random batch"
    save_weights(arguments.output, model, variables, preprocessing=info.preprocessing, class_names=info.class_names)
    return f"{arguments.output}: {info.variant.name}, {info.num_classes} classes, {done}"


def main() -> None:
    """The command."""
    print(convert(tyro.cli(Arguments, prog="python -m convert")), file=sys.stdout)


if __name__ == "__main__":
    run_command(main)
