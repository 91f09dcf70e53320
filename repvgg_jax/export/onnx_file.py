"""ONNX files."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from ..errors import ExportError
from ..extras import install_hint
from ..files import atomic_path
from ..net.model import RepVGG
from ..preprocess import Preprocessing
from .deploy_net import Check, InputLayout, deploy_net


def export_onnx(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    input_layout: InputLayout = "NCHW",
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    dynamic_size: bool = False,
    check: Check | None = None,
) -> None:
    """Write the deploy form as an ONNX file, atomically.

    The file takes `images` (float32, normalised, `[N, C, H, W]` or `[N, H, W, C]`, any N) and gives `logits`
    (float32 `[N, classes]`). Its metadata tells the variant, the layout, the preprocessing and the class names.

    Args:
      path: where to write.
      model: training form (fused here) or deploy form, computing in any dtype; the file is float32.
      variables: its variables.
      input_layout: NCHW, as ONNX computes, or NHWC, transposed once in front.
      image_size: pixels, one number or (height, width); the preprocessing's if None.
      preprocessing: what makes an image network input; the variant's published evaluation if None.
      class_names: names by class index.
      dynamic_size: leave height and width free in the file; `image_size` then only says what the net was made for.
      check: sees the written file before it is put in place; what it raises leaves nothing behind.

    Raises:
      ExportError: onnx is not installed.
      WeightsError: the variables are not this model's, or have NaN.
      FusionError: a training form that cannot be fused.
      RepVGGError: the file cannot be written.
      ValueError: an unknown layout, a non-positive size, or not one name for each class.
    """
    check_onnx_installed()
    from .onnx_graph import build_onnx

    net = deploy_net(model, variables, input_layout, image_size, preprocessing, class_names, dynamic_size)
    built = build_onnx(net)
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.SerializeToString())
        if check is not None:
            check(temporary)


def check_onnx_installed() -> None:
    """Raises ExportError, with what to install, where there is no onnx."""
    if importlib.util.find_spec("onnx") is None:
        raise ExportError(f"writing ONNX needs onnx: {install_hint('export')}")
