"""Post-training quantisation of a weight file: `python -m convert IN OUT --int8 --calibration DATA`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import repvgg_jax as rv
from convert.calibration_images import DEFAULT_COUNT, calibration_images
from repvgg_jax.errors import ConfigError, WeightsError
from repvgg_jax.export.onnx_file import OnnxTarget, check_onnx_installed
from repvgg_jax.files import check_target
from repvgg_jax.quantization.adaround import require_optax
from repvgg_jax.quantization.calibration import Calibration
from repvgg_jax.quantization.methods import check_images, choose_method
from repvgg_jax.quantization.stack import check_relu
from repvgg_jax.weights import WeightsInfo


@dataclasses.dataclass(frozen=True)
class Int8Options:
    """Post-training quantisation to INT8."""

    int8: bool = False
    """Quantise to INT8. Needs --calibration. OUT must be a .safetensors file, or an .onnx file (in QDQ format)."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Calibration images: a folder, or digits for scikit-learn's digits data set."""
    method: str = "corrected"
    """Quantisation method: naive, per-channel, equalized, corrected or full. Each includes the steps of those
    before it. full is slow, since it also learns the rounding."""
    activations: Calibration | None = None
    """How to choose the activation ranges. Default: minmax for naive and per-channel, mse for the other methods."""
    per_tensor: bool = False
    """Use one weight scale per layer instead of one per output channel."""
    float_first: bool = False
    """Keep the first convolution in float."""
    float_last: bool = False
    """Keep the classifier in float."""
    calibration_images: int = DEFAULT_COUNT
    """Number of calibration images to use. If DATA has fewer, all are used."""
    onnx_target: OnnxTarget = "onnxruntime"
    """Runtime that the .onnx file is for. tensorrt: int8 tensors and float biases. OpenVINO runs both kinds."""
    report: bool = False
    """Print the quantisation error of each layer."""


def check_options(options: Int8Options, output: str) -> None:
    """Reject options that cannot work, before reading any file.

    Raises:
      ConfigError: the options contradict each other.
      RepVGGError: the output cannot be written, or a library is missing.
    """
    if not options.int8:
        changed = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
        if changed:
            raise ConfigError(f"--{changed[0].replace('_', '-')} needs --int8")
        return
    if options.calibration is None:
        raise ConfigError("--int8 needs --calibration DATA: a folder of images, or digits")
    if options.calibration_images < 1:
        raise ConfigError(f"--calibration-images must be at least 1, not {options.calibration_images}")
    if choose_method(options.method).adaround is not None:
        require_optax()
    suffix = Path(output).suffix
    if suffix not in (".safetensors", ".onnx"):
        raise WeightsError(f"cannot write {output}: quantised nets are .safetensors or .onnx files, not {suffix!r}")
    if suffix == ".onnx":
        check_onnx_installed()
    elif options.onnx_target != "onnxruntime":
        raise ConfigError(f"--onnx-target is for .onnx, not for {output}")
    check_target(output)


def read_images(options: Int8Options, info: WeightsInfo) -> np.ndarray:
    """Read the calibration images, and check before the net is loaded and fused that it can be quantised with them.

    Args:
      options: options of the command.
      info: description of the input file.

    Returns:
      uint8 `[N, image_size, image_size, C]`.

    Raises:
      DataError: the images cannot be read.
      QuantizationError: the net cannot be quantised, or there are too few images.
    """
    assert options.calibration is not None
    check_relu(info.variant)
    images = calibration_images(options.calibration, info.preprocessing, options.calibration_images)
    check_images(images, info.in_channels, info.preprocessing)
    return images


def quantize_and_write(
    options: Int8Options,
    output: str,
    model: rv.RepVGG,
    variables: Any,
    info: WeightsInfo,
    images: np.ndarray,
    **onnx_options: Any,
) -> str:
    """Calibrate, quantise and write the output; return a summary.

    Args:
      options: options of the command.
      output: file to write.
      model: model in deploy form.
      variables: variables of `model`.
      info: description of the input file.
      images: images of `read_images`.
      **onnx_options: options of `export_quantized_onnx`; used if `output` is an .onnx.

    Raises:
      RepVGGError: the output cannot be written.
    """
    net = rv.quantize(
        model,
        variables,
        images,
        options.method,
        per_channel=False if options.per_tensor else None,
        calibration=options.activations,
        float_first=options.float_first,
        float_last=options.float_last,
        preprocessing=info.preprocessing,
        class_names=info.class_names,
    )
    if Path(output).suffix == ".onnx":
        rv.export_quantized_onnx(output, net, target=options.onnx_target, **onnx_options)
    else:
        rv.save_quantized(output, net)
    worst = min(net.report, key=lambda layer: layer.output_sqnr)
    done = (
        f"INT8 ({options.method}) from {len(images)} calibration images; signal-to-noise ratio: "
        f"{net.report[-1].network_sqnr:.1f} dB for the logits, {worst.output_sqnr:.1f} dB for the worst layer, "
        f"{worst.name}"
    )
    return f"{rv.report_table(net.report)}\n{done}" if options.report else done
