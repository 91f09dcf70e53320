"""Outputs of an ONNX file in third-party runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino


def in_onnxruntime(path: Path, images: np.ndarray) -> Any:
    """Return the logits from Microsoft's runtime."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"images": images})[0]


def in_openvino(path: Path, images: np.ndarray) -> Any:
    """Return the logits from Intel's runtime in float32; by default it uses bfloat16 on CPUs that support it."""
    net = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return net({"images": images})["logits"]


def nchw(images: np.ndarray) -> np.ndarray:
    """Return `[N, H, W, C]` as `[N, C, H, W]`."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
