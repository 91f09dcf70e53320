"""Facts shown on the page of a weight file, as data without HTML."""

import dataclasses
from typing import Literal

import numpy as np

from ..prediction_files import Guess
from ..weights import WeightsInfo

OUTLIER = 4.0
"""A channel with more than this many times the median channel's range is an outlier."""

HALF_STEP = 1 / 254
"""Fraction of the layer's largest weight below which a weight becomes 0 in 8 bits, with one scale for the layer."""

SHOWN_OUTLIERS = 12
"""Largest number of outliers of a layer to draw individually; only the largest ones are kept."""


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Cost of one stage or one part of the head for one image, counted as in `net.summary`.

    Attributes:
      name: name of the stage, "linear", or "auxiliary heads".
      blocks: names of the stage's blocks; empty for the head.
      in_size: side of the input in pixels; 0 for the head.
      out_size: side of the output in pixels; 0 for the head.
      channels: number of output channels.
      groups: largest number of groups in the stage.
      params: parameters of the deploy form.
      train_params: parameters of the training form.
      flops: multiply-adds of the deploy form.
      train_flops: multiply-adds of the training form.
      winograd_muls: multiplications left with F(2x2, 3x3), not rounded.
    """

    name: str
    blocks: tuple[str, ...]
    in_size: int
    out_size: int
    channels: int
    groups: int
    params: int
    train_params: int
    flops: int
    train_flops: int
    winograd_muls: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """Distribution of the ranges (largest absolute values) of one layer's channels.

    Channels of zeros are counted but otherwise ignored, because any scale represents them exactly.

    Attributes:
      channels: number of channels.
      dead: number of channels that are all zeros.
      least: smallest range of the other channels; this and the next four are 0 if there are no others.
      lower: first quartile.
      median: median.
      upper: third quartile.
      largest: largest range.
      outliers: number of channels with more than `OUTLIER` times the median range.
      largest_outliers: their ranges in ascending order, at most `SHOWN_OUTLIERS`.
      vanishing: number of channels whose range is below `HALF_STEP` of the largest.
    """

    channels: int
    dead: int
    least: float
    lower: float
    median: float
    upper: float
    largest: float
    outliers: int
    largest_outliers: tuple[float, ...]
    vanishing: int

    @property
    def ratio(self) -> float:
        """Largest range divided by the median range, a span that a single scale must cover; 1 for a layer of zeros."""
        return self.largest / self.median if self.median else 1.0

    @classmethod
    def of(cls, ranges: np.ndarray) -> "Spread":
        """Return the statistics of the ranges `[C]` of a layer's channels."""
        alive = np.sort(ranges[ranges != 0].astype(np.float64))
        dead = len(ranges) - len(alive)
        if not len(alive):
            return cls(len(ranges), dead, 0, 0, 0, 0, 0, 0, (), 0)
        least, lower, median, upper, largest = np.quantile(alive, (0, 0.25, 0.5, 0.75, 1)).tolist()
        outliers = alive[alive > OUTLIER * median]
        return cls(
            channels=len(ranges),
            dead=dead,
            least=least,
            lower=lower,
            median=median,
            upper=upper,
            largest=largest,
            outliers=len(outliers),
            largest_outliers=tuple(outliers[-SHOWN_OUTLIERS:].tolist()),
            vanishing=int((alive < largest * HALF_STEP).sum()),
        )


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer of the deploy form.

    Attributes:
      name: name of the layer; `linear` is the classifier.
      shape: shape of the kernel.
      lowest: smallest weight.
      highest: largest weight.
      spread: statistics of the output channels' ranges.
    """

    name: str
    shape: tuple[int, ...]
    lowest: float
    highest: float
    spread: Spread


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """The inputs of one layer on all images.

    Attributes:
      name: name of the layer; `pool` is the average before the classifier `linear`.
      lowest: smallest value.
      highest: largest value.
      usual: 99.99th percentile of the absolute values, to within 2 %.
      zeros: fraction of values that are 0.
      spread: statistics of the channels' ranges.
      limit: absolute value at which an INT8 net saturates the input; None for a float layer.
      saturated: fraction of values at that limit.
    """

    name: str
    lowest: float
    highest: float
    usual: float
    zeros: float
    spread: Spread
    limit: float | None = None
    saturated: float = 0.0

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(-self.lowest, self.highest)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between two computations of the same outputs on the same images.

    Attributes:
      expected: description of the reference computation.
      actual: description of the other computation.
      images: number of images.
      largest: largest absolute difference of any output.
      relative: largest `||expected - actual|| / ||expected||` of any image.
      same_class: number of images with the same top class; None if the outputs are not logits.
    """

    expected: str
    actual: str
    images: int
    largest: float
    relative: float
    same_class: int | None


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Algorithm and time of one layer.

    Attributes:
      name: name of the layer.
      algorithm: name of the algorithm.
      multiplications: multiplications of the algorithm per image.
      seconds: time per image; None if there is neither a cost model nor a measurement.
    """

    name: str
    algorithm: str
    multiplications: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """Plan and times of the predictor.

    Attributes:
      batch_size: images per call.
      source: origin of the plan (`inference.plan.Plan.source`); None for an INT8 net, which has no plan.
      times_from: origin of the layers' times.
      layers: all convolutions; empty for an INT8 net.
      device: description of the device.
      net_seconds: measured time per image of the whole net; None if nothing was measured.
    """

    batch_size: int
    source: str | None
    times_from: Literal["cost model", "measurement"] | None
    layers: tuple[LayerTime, ...]
    device: str
    net_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Photo:
    """An image and its predictions.

    Attributes:
      name: path of its file, without the parent folders that all images share.
      jpeg: thumbnail of the image as the net sees it.
      guesses: most likely classes, most likely first; empty for a net without a classifier.
    """

    name: str
    jpeg: bytes
    guesses: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """All facts of a page.

    Attributes:
      file: path of the weight file, as typed by the user.
      info: description of the weight file.
      stages: cost of each stage and of the head.
      photos: the user's images; empty if there are none.
      images: number of images used for all results.
      pseudo_random: whether they are noise, because the user gave no images.
      listed: number of images that they were chosen from; 0 if all were used.
      unusable: number of images (or folders) that could not be read or computed.
      differences: differences between computations of the outputs.
      weights: weights of each layer, from image to classifier.
      inputs: inputs of each layer, from image to classifier.
      plan: plan and times of the predictor.
    """

    file: str
    info: WeightsInfo
    stages: tuple[StageCost, ...]
    photos: tuple[Photo, ...]
    images: int
    pseudo_random: bool
    listed: int
    unusable: int
    differences: tuple[Difference, ...]
    weights: tuple[LayerWeights, ...]
    inputs: tuple[LayerInput, ...]
    plan: PlanFacts
