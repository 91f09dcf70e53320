"""Post-training quantisation and its methods, from naive to full."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import QuantizationError
from ..net.fusion import to_deploy
from ..net.layout import check_variables
from ..net.model import RepVGG
from ..preprocess import Preprocessing, normalize
from ..trees import flatten
from ..weights.info import default_preprocessing
from .adaround import AdaRoundOptions
from .calibration import Calibration, channel_ranges, input_scales
from .equalize import equalize_activations, equalize_weights
from .net import QuantizedNet
from .reconstruct import Rounding, quantize_layers
from .stack import LINEAR, check_relu, layers_of

MIN_IMAGES = 8
"""Fewer calibration images say nothing about the range of an activation."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Steps of post-training quantisation.

    Attributes:
      per_channel: use one weight scale per output channel instead of one per layer.
      calibration: how the range of an activation is chosen.
      equalize: first rescale channels between layers, in the way that suits the weight scales (`per_channel`).
      bias_correction: subtract the mean error of each channel.
      adaround: learn the rounding of weights with these options; round to nearest if None.
    """

    per_channel: bool = True
    calibration: Calibration = "minmax"
    equalize: bool = False
    bias_correction: bool = False
    adaround: AdaRoundOptions | None = None


METHODS: dict[str, Method] = {
    "naive": Method(per_channel=False),
    "per-channel": Method(),
    "equalized": Method(calibration="mse", equalize=True),
    "corrected": Method(calibration="mse", equalize=True, bias_correction=True),
    "full": Method(calibration="mse", equalize=True, bias_correction=True, adaround=AdaRoundOptions()),
}


def quantize(
    model: RepVGG,
    variables: Mapping[str, Any],
    calibration_images: Any,
    method: str | Method = "corrected",
    *,
    per_channel: bool | None = None,
    calibration: Calibration | None = None,
    float_first: bool = False,
    float_last: bool = False,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
) -> QuantizedNet:
    """Return a trained net quantised to 8-bit weights and activations, without further training.

    Args:
      model: model in training form (fused here) or deploy form.
      variables: the model's variables.
      calibration_images: a few hundred images like those that the net will see, prepared in the same way: float
        `[N, H, W, C]`, normalised; or uint8, if `preprocessing` is passed to normalise them with.
      method: one of `METHODS`, or a custom `Method`. "full" also learns the rounding of weights, which needs optax and
        takes many times as long; it is worthwhile for weights with one scale per layer.
      per_channel: overrides the method's setting.
      calibration: overrides the method's setting.
      float_first: leave the first convolution in float.
      float_last: leave the classifier in float.
      preprocessing: how images are prepared, stored with the net. Images of another size are then refused.
      class_names: names by class index, stored with the net.

    Returns:
      The quantised net, with a report on each layer.

    Raises:
      QuantizationError: the method is unknown, the activation is not ReLU, or the images are too few, of the wrong
        shape, or contain NaN.
      WeightsError: the variables do not belong to the model, or contain NaN.
      FusionError: the training form cannot be fused.
    """
    method = choose_method(method, per_channel, calibration)
    if not model.deploy:
        model, variables = to_deploy(model, variables)
    check_relu(model.variant)
    channels = check_variables(flatten(variables), model.variant, True, model.num_classes)
    images = np.asarray(calibration_images)
    check_images(images, channels, preprocessing)
    if preprocessing is not None and images.dtype == np.uint8:
        images = normalize(images, preprocessing)
    images = images.astype(np.float32, copy=False)

    variant, before = model.variant, layers_of(variables["params"])
    layers = before
    if method.equalize and method.per_channel:
        layers = equalize_activations(variant, layers, channel_ranges(variant, layers, images))
    elif method.equalize:
        layers = equalize_weights(variant, layers)
    rounding = Rounding(
        method.per_channel,
        method.bias_correction,
        method.adaround,
        in_float=("stage0",) * float_first + (LINEAR,) * float_last,
    )
    scales = input_scales(variant, layers, images, method.calibration)
    params, report = quantize_layers(variant, layers, scales, images, rounding, before)
    if preprocessing is None:
        preprocessing = dataclasses.replace(default_preprocessing(variant, channels), image_size=images.shape[1])
    return QuantizedNet(variant, model.num_classes, channels, params, preprocessing, class_names, report)


def choose_method(
    method: str | Method, per_channel: bool | None = None, calibration: Calibration | None = None
) -> Method:
    """Return a method by name, with the given settings overridden.

    Raises:
      QuantizationError: the name is unknown.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise QuantizationError(f"unknown quantisation method {method!r}; choose from {', '.join(METHODS)}")
        method = METHODS[method]
    changes = {"per_channel": per_channel, "calibration": calibration}
    return dataclasses.replace(method, **{name: value for name, value in changes.items() if value is not None})


def check_images(images: np.ndarray, channels: int, preprocessing: Preprocessing | None) -> None:
    """Check calibration images: normalised ones, or uint8 ones that `preprocessing` normalises.

    Raises:
      QuantizationError: the images are unsuitable; the message says why, and which image.
    """
    size = "H, W" if preprocessing is None else f"{preprocessing.image_size}, {preprocessing.image_size}"
    fits = images.ndim == 4 and images.shape[-1] == channels
    if not fits or (preprocessing is not None and images.shape[1:3] != (preprocessing.image_size,) * 2):
        raise QuantizationError(f"calibration images must have shape [N, {size}, {channels}], not {list(images.shape)}")
    if len(images) < MIN_IMAGES:
        count = "one image is" if len(images) == 1 else f"{len(images)} images are"
        raise QuantizationError(
            f"{count} too few to calibrate with: give at least {MIN_IMAGES}, preferably a few hundred"
        )
    if images.dtype == np.uint8:
        if preprocessing is None:
            raise QuantizationError("calibration images are uint8: normalise them, or give the preprocessing")
        return
    broken = np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))
    if len(broken):
        raise QuantizationError(f"calibration image {broken[0]} has NaN or infinite values ({len(broken)} have)")
