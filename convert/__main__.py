"""Conversion: `python -m convert IN OUT -a NAME` turns training-form weights into deploy-form ones.

Reads whatever `repvgg_jax.load_weights` reads, whoever wrote it; suffixes and `--to` choose the format written.
`--int8 --calibration DATA` quantises (`int8.py`).
`python -m convert --inspect FILE` says what a file is.
"""

import dataclasses
import sys
import warnings
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.errors import ConfigError, FusionError, WeightsError
from repvgg_jax.variants import VARIANTS
from repvgg_jax.weights import WeightsInfo, WeightsWarning, inspect_weights, save_weights
from repvgg_jax.weights.saving import check_writable

from .int8 import Int8Options, check_options, quantize_and_write

TOLERANCE = 1e-4
"""Largest relative difference between the forms' logits that is still float32 rounding, in the deepest nets."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert a weight file: any known format in, any writable out, fused into the deploy form on the way."""

    input: tyro.conf.Positional[str | None] = None
    """Weight file to read, or hf://OWNER/REPOSITORY."""
    output: tyro.conf.Positional[str | None] = None
    """Weight file to write: .safetensors (native), or .pth, .pt, .bin, .tar (PyTorch, the authors' names)."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Variant the file must hold."""
    keep_training_form: bool = False
    """Rewrite the weights in another format without fusing them."""
    to: Literal["native", "authors", "timm", "mmpretrain"] | None = None
    """Whose names to write."""
    num_classes: int | None = None
    """Write a fresh classifier of this many classes if the file has another."""
    ema: bool = False
    """Take the moving average of the weights, where a training checkpoint has one."""
    tensors_only: bool = False
    """Pass over pickled objects beside the weights instead of refusing the file. Runs none of its code either way."""
    inspect: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Say what this file is, and convert nothing."""
    quantization: tyro.conf.OmitArgPrefixes[Int8Options] = dataclasses.field(default_factory=Int8Options)


def relative_difference(model: rv.RepVGG, variables: Any, other: rv.RepVGG, other_variables: Any) -> float:
    """`||a - b|| / ||a||` of two models' logits on one random batch, at the smallest size that fills the net."""
    channels = jax.tree.leaves(variables["params"]["stage0"]["rbr_dense"]["conv"])[0].shape[2]
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, channels))
    with jax.default_matmul_precision("highest"):
        # Layer by layer: many have the same shape, while compiling a whole net for one batch takes long.
        expected = model.apply(variables, images)
        found = other.apply(other_variables, images)
    assert isinstance(expected, jax.Array)
    assert isinstance(found, jax.Array)
    return float(jnp.linalg.norm(expected - found) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))


def convert(arguments: Arguments) -> str:
    """Do what `arguments` ask for, and say in one line what was done.

    Raises:
      WeightsError: unreadable input, an output that cannot be written, or a fused net that differs from the
        training form.
      FusionError: `keep_training_form` for an input in deploy form.
      ConfigError: no input or no output.
    """
    if arguments.input is None or arguments.output is None:
        raise ConfigError("expected IN and OUT, or --inspect FILE")
    if arguments.num_classes is not None and arguments.num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, not {arguments.num_classes}")
    options: dict[str, Any] = dict(ema=arguments.ema, tensors_only=arguments.tensors_only)
    info = inspect_weights(arguments.input, arguments.arch, **options)
    int8 = arguments.quantization
    check_options(int8, arguments.output)
    if int8.int8 and (arguments.keep_training_form or arguments.to):
        raise ConfigError("--int8 writes a fused net under our own names: leave --keep-training-form and --to away")
    if not int8.int8:
        check_writable(arguments.output, info.variant, not arguments.keep_training_form, arguments.to)
    if arguments.keep_training_form and info.deploy:
        raise FusionError(f"{arguments.input} is in deploy form, which has no training form")
    model, variables = rv.load_weights(arguments.input, arguments.arch, arguments.num_classes, **options)
    done = "deploy form, as it was" if model.deploy else "training form kept"
    if not arguments.keep_training_form and not model.deploy:
        fused_model, fused = model.clone(deploy=True), jax.jit(rv.fuse_variables)(variables)
        difference = relative_difference(model, variables, fused_model, fused)
        if not difference <= TOLERANCE:
            raise WeightsError(
                f"the fused net differs from the training form by {difference:.2e} (relative); nothing written. "
                "Float32 cannot hold these weights: are they those of a finished training?"
            )
        model, variables, done = fused_model, fused, f"fused, relative difference {difference:.1e} on a random batch"
    if int8.int8:
        done = quantize_and_write(int8, arguments.output, model, variables, info)
        return f"{arguments.output}: {model.variant.name}, {model.num_classes} classes, {done}"
    save_weights(
        arguments.output,
        model,
        variables,
        family=arguments.to,
        preprocessing=info.preprocessing,
        class_names=info.class_names if model.num_classes == info.num_classes else None,
        num_batches_tracked=info.num_batches_tracked,
    )
    return f"{arguments.output}: {model.variant.name}, {model.num_classes} classes, {done}"


def describe(path: str, info: WeightsInfo) -> str:
    """One line on what a file is."""
    form = "INT8 deploy" if info.quantized else "deploy" if info.deploy else "training"
    classes = f"{info.num_classes} classes" if info.num_classes else "no classifier"
    variant = info.variant.name
    if info.variant != VARIANTS.get(variant):
        variant += f" (blocks {info.variant.num_blocks}, widths {info.variant.widths}, groups {info.variant.groups})"
    return (
        f"{path}: {variant}, {form} form, {info.family} names, {classes}, {info.in_channels} input channels, "
        f"{info.dtype}, {info.num_parameters:,} parameters"
    )


def main() -> None:
    """The command."""
    arguments = tyro.cli(Arguments, prog="python -m convert")
    if arguments.inspect is not None:
        if arguments.input is not None:
            raise ConfigError("--inspect FILE converts nothing: leave IN and OUT away")
        options: dict[str, Any] = dict(ema=arguments.ema, tensors_only=arguments.tensors_only)
        print(describe(arguments.inspect, inspect_weights(arguments.inspect, arguments.arch, **options)))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        done = convert(arguments)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(done)


if __name__ == "__main__":
    run_command(main)
