"""torchvision, importable next to a torch of another build: import it from here."""

import contextlib

import pytest
import torch

_operators = torch.library.Library("torchvision", "FRAGMENT")
for _declaration in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # its own operators load only where its build matches torch's
        _operators.define(_declaration)

torchvision = pytest.importorskip("torchvision")
