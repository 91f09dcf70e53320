"""Conversion command: `python -m convert IN OUT -a NAME` turns training-form weights into deploy-form ones.

Reads every format that `repvgg_jax.load_weights` reads. The suffix of OUT and `--to` set the output format: a weight
file, or an export for another runtime (see `exports`). `--int8 --calibration DATA` also quantises the net (see
`quantization`). `python -m convert --inspect FILE` only describes a file.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("convert.__main__")

import dataclasses
import functools
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import repvgg_jax as rv
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
from repvgg_jax.errors import ConfigError, FusionError, WeightsError
from repvgg_jax.net.layout import in_channels_of
from repvgg_jax.paths import expand_home
from repvgg_jax.trees import flatten
from repvgg_jax.weights import WeightsWarning, inspect_weights, save_weights
from repvgg_jax.weights.architecture import expected_variant
from repvgg_jax.weights.argument import weights_path
from repvgg_jax.weights.info import describe
from repvgg_jax.weights.key_maps import FAMILIES
from repvgg_jax.weights.loading import check_float
from repvgg_jax.weights.options import WeightsOptions
from repvgg_jax.weights.saving import NATIVE, WRITABLE, check_writable

from .compare import logits_of, relative_difference
from .exports import FORMATS, ONNX, Format, check_batches, choose_format, write_export
from .output import check_output
from .quantization import Int8Options, check_options, quantize_and_write, read_images

TOLERANCE = 1e-4
"""Largest relative difference between the two forms' logits that float32 rounding causes, even in the deepest nets."""


_IN_HELP = (
    "Weight file to read: a path, an hf://OWNER/REPOSITORY address, or the name of a variant, such as RepVGG-A0, to "
    "use its ImageNet weights. A file of that name takes precedence."
)
_OUT_HELP = (
    "File to write. The suffix sets the format. Weight files: .safetensors (native); .pth, .pt, .tar (PyTorch, with "
    "the authors' tensor names). Exports, which are always fused: .onnx; .stablehlo or .bin (jax.export); .savedmodel "
    "or a trailing slash (TensorFlow SavedModel)."
)
_TO_HELP = (
    f"Naming scheme for the tensors in OUT: {NATIVE}, {', '.join(FAMILIES)}. With this option, .bin is a "
    "PyTorch file instead of an export."
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert a weight file to another format. Weights in training form are fused to the deploy form by default."""

    input: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[IN]", help=_IN_HELP)] = None
    output: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[OUT]", help=_OUT_HELP)] = None
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Architecture expected in IN: the name of a variant, a JSON file with its fields, or another weight file. If IN
    contains another architecture, it is an error."""
    overwrite: bool = False
    """Replace OUT if it exists. IN itself is never overwritten."""
    keep_training_form: bool = False
    """Keep the training form instead of fusing it; change only the file format or the tensor names."""
    to: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help=_TO_HELP)] = None
    num_classes: int | None = None
    """Number of classes. If the classifier in IN has a different number, a newly initialised one replaces it."""
    input_layout: Literal["NCHW", "NHWC"] | None = None
    """For exports: layout of the input images. Default: NCHW for .onnx and NHWC for the other formats."""
    free_size: bool = False
    """For ONNX exports: accept images of any height and width."""
    check_images: tuple[str, ...] = ()
    """For exports: images or folders on which to compare the export with JAX. Default: two sample photographs."""
    inspect: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Print a description of this file instead of converting."""
    weights: Annotated[tyro.conf.OmitArgPrefixes[WeightsOptions], tyro.conf.arg(name="weight-file")] = (
        dataclasses.field(default_factory=WeightsOptions)
    )
    quantization: Annotated[tyro.conf.OmitArgPrefixes[Int8Options], tyro.conf.arg(name="quantisation")] = (
        dataclasses.field(default_factory=Int8Options)
    )


def difference_of_forms(model: rv.RepVGG, variables: Any, other: rv.RepVGG, other_variables: Any) -> float:
    """Return `||a - b|| / ||a||` between two models' logits on one random batch of small images, 64 pixels square.

    Raises:
      WeightsError: the first model's logits are not finite.
    """
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, in_channels_of(flatten(variables))))
    expected = logits_of(model, variables, images)
    if not np.isfinite(expected).all():
        raise WeightsError(
            "the training form's logits on a random batch are NaN or infinite: float32 cannot hold what these weights "
            "compute; nothing written. Are they from a finished training run?"
        )
    return relative_difference(expected, logits_of(other, other_variables, images))


def convert(arguments: Arguments) -> str:
    """Convert as `arguments` specify, and return a one-line summary.

    Raises:
      WeightsError: the input cannot be read, the output cannot be written, or the fused net differs from the training
        form.
      ExportError: a library is missing, or the export differs from JAX.
      DataError: the images for the check or for the calibration cannot be read.
      QuantizationError: the net cannot be quantised, or there are too few images.
      FusionError: `keep_training_form` is set, and the input is in deploy form.
      ConfigError: the input or output is missing, the output is the input or exists already, or an option does not
        apply to this output.
    """
    arguments = _expanded(arguments)
    if arguments.input is None or arguments.output is None:
        raise ConfigError("expected IN and OUT, or --inspect FILE")
    if arguments.num_classes is not None and arguments.num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, not {arguments.num_classes}")
    export = None if arguments.quantization.int8 else _export_format(arguments, arguments.output)
    folder = export is not None and export.folder
    check_output(arguments.input, arguments.output, overwrite=arguments.overwrite, folder=folder)
    options = arguments.weights.reading
    expected = expected_variant("--arch", arguments.arch)
    info = inspect_weights(arguments.input, expected, **options)
    info = arguments.weights.apply(info, arguments.num_classes)
    check_float(arguments.input, info)
    if arguments.keep_training_form and info.deploy:
        raise FusionError(f"{arguments.input} is in deploy form, which has no training form")
    int8 = arguments.quantization
    check_options(int8, arguments.output)
    if int8.int8:
        _check_int8_arguments(arguments, arguments.output)
    described: dict[str, Any] = dict(preprocessing=info.preprocessing, class_names=info.class_names)
    batches, calibration = [], None
    if int8.int8:
        calibration = read_images(int8, info)
    elif export is not None:
        export.check(arguments.output, overwrite=arguments.overwrite)
        batches = check_batches(arguments.check_images, info.preprocessing, info.in_channels, arguments.free_size)
    else:
        check_writable(arguments.output, info.variant, not arguments.keep_training_form, arguments.to, **described)
    model, variables = rv.load_weights(arguments.input, expected, arguments.num_classes, **options)
    done = "already in deploy form" if model.deploy else "training form kept"
    if not arguments.keep_training_form and not model.deploy:
        fuse = functools.partial(rv.fuse_variables, epsilon=model.variant.epsilon)
        fused_model, fused = model.clone(deploy=True), jax.jit(fuse)(variables)
        difference = difference_of_forms(model, variables, fused_model, fused)
        if not difference <= TOLERANCE:
            raise WeightsError(
                f"the fused net differs from the training form by {difference:.2e} (relative); nothing written. "
                "Float32 is not precise enough for these weights. Are they from a finished training run?"
            )
        model, variables, done = fused_model, fused, f"fused, relative difference {difference:.1e} on a random batch"
    if calibration is not None:
        onnx_options = {"input_layout": arguments.input_layout or ONNX.layout, "dynamic_size": arguments.free_size}
        done = quantize_and_write(int8, arguments.output, model, variables, info, calibration, **onnx_options)
    elif export is None:
        tracked = info.num_batches_tracked
        save_weights(arguments.output, model, variables, family=arguments.to, num_batches_tracked=tracked, **described)
    else:
        layout = arguments.input_layout or export.layout
        described |= dict(layout=layout, free_size=arguments.free_size, batches=batches, tolerance=TOLERANCE)
        done += f"; {layout}, {write_export(arguments.output, export, model, variables, **described)}"
    return f"{arguments.output}: {model.variant.name}, {model.num_classes} classes, {done}"


def _expanded(arguments: Arguments) -> Arguments:
    """Return the arguments with the input resolved and `~` expanded (shells do not expand it in `--option=~/x`)."""
    return dataclasses.replace(
        arguments,
        input=arguments.input and weights_path("IN", arguments.input),
        output=arguments.output and expand_home(arguments.output),
        check_images=tuple(map(expand_home, arguments.check_images)),
    )


def _export_format(arguments: Arguments, output: str) -> Format | None:
    """Return the export format of the output, or None for a weight file.

    Raises:
      ConfigError: the suffix is unknown, or an option for weight files is used with an export or vice versa.
    """
    export = None if arguments.to is not None and Path(output).suffix == ".bin" else choose_format(output)
    if export is None:
        if Path(output).suffix not in WRITABLE:
            suffixes = ", ".join((*WRITABLE, *(suffix for suffix in FORMATS if suffix not in WRITABLE)))
            raise ConfigError(
                f"cannot write {output}: unknown suffix {Path(output).suffix!r}, expected one of {suffixes}"
            )
        _check_no_export_options(arguments)
        return None
    if arguments.free_size and export is not ONNX:
        raise ConfigError(f"--free-size is for .onnx, not for {output}")
    if arguments.keep_training_form or arguments.to is not None:
        raise ConfigError(
            f"{output} is an export, which is always fused and has no names: no --keep-training-form or --to"
        )
    return export


def _check_int8_arguments(arguments: Arguments, output: str) -> None:
    """Raise ConfigError for an option that does not apply to a quantised output."""
    if arguments.keep_training_form or arguments.to:
        raise ConfigError("--int8 always writes a fused net with native names: remove --keep-training-form and --to")
    if Path(output).suffix != ".onnx":
        _check_no_export_options(arguments)
    if arguments.check_images:
        raise ConfigError(
            "--check-images compares with JAX to float32's rounding, which --int8 does not reach: remove it"
        )


def _check_no_export_options(arguments: Arguments) -> None:
    if arguments.input_layout or arguments.free_size or arguments.check_images:
        raise ConfigError("--input-layout, --free-size and --check-images are for exports, not for weight files")


def main() -> None:
    """Run the command."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m convert", registry=plain_help())
    if arguments.inspect is not None:
        if arguments.input is not None:
            raise ConfigError("--inspect FILE does not convert: remove IN and OUT")
        path = weights_path("--inspect", arguments.inspect)
        info = inspect_weights(path, expected_variant("--arch", arguments.arch), **arguments.weights.reading)
        print(describe(path, arguments.weights.apply(info)))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        try:
            done = convert(arguments)
        finally:
            for warning in caught:
                print(f"warning: {warning.message}", file=sys.stderr)
    print(done)
