"""What a page about a weight file says, as data: numbers and names, no HTML."""

import dataclasses
from typing import Literal

import numpy as np

from ..prediction_files import Guess
from ..weights import WeightsInfo

OUTLIER = 4.0
"""A channel with more than so many times the median channel's range is an outlier."""

HALF_STEP = 1 / 254
"""Of the largest weight of a layer: what is smaller becomes 0 in 8 bits with one scale for the layer."""

SHOWN_OUTLIERS = 12
"""So many of a layer's outliers, the largest, are kept one by one."""


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What one stage, or one part of the head, costs for one image, as `net.summary` counts.

    Attributes:
      name: the stage's, "linear", or "auxiliary heads".
      blocks: names of the stage's blocks; none for the head.
      in_size, out_size: pixels a side; 0 for the head.
      channels: of the output.
      groups: the largest number of groups in it.
      params, train_params: of deploy and training form.
      flops, train_flops: multiply-adds of both.
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
    """How the ranges (largest absolute values) of one layer's channels differ.

    Channels of zeros are counted, and left out of everything else: 8 bits hold them at any scale.

    Attributes:
      channels: how many there are.
      dead: how many of them are all zeros.
      least, lower, median, upper, largest: minimum, quartiles and maximum of the others' ranges; 0 if there are none.
      outliers: how many channels have more than `OUTLIER` times the median range.
      largest_outliers: their ranges, rising, `SHOWN_OUTLIERS` at most.
      vanishing: how many channels are below `HALF_STEP` of the largest.
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
        """The largest range over the median one: what one scale has to span; 1 for a layer of zeros."""
        return self.largest / self.median if self.median else 1.0

    @classmethod
    def of(cls, ranges: np.ndarray) -> "Spread":
        """Return what the ranges `[C]` of a layer's channels are like."""
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
      name: the layer's; `linear` is the classifier.
      shape: of its kernel.
      lowest, highest: of its weights.
      spread: of its output channels' ranges.
    """

    name: str
    shape: tuple[int, ...]
    lowest: float
    highest: float
    spread: Spread


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """What one layer read on all images.

    Attributes:
      name: the layer's; `pool` is the average before the classifier `linear`.
      lowest, highest: of its values.
      usual: what 99.99 % of the absolute values are below, to within 2 %.
      zeros: share of values that are 0.
      spread: of its channels' ranges.
      limit: the absolute value that it saturates at, in an INT8 net; None in float.
      saturated: share of the values that are at that limit.
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
        """The largest absolute value."""
        return max(-self.lowest, self.highest)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two computations of the same outputs are apart, on the same images.

    Attributes:
      expected, actual: what was compared, in words.
      images: how many.
      largest: the largest absolute difference of an output.
      relative: the largest `||expected - actual|| / ||expected||` of an image.
      same_class: for how many images the largest output is the same; None where outputs are no classes.
    """

    expected: str
    actual: str
    images: int
    largest: float
    relative: float
    same_class: int | None


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """How one layer is computed.

    Attributes:
      name: the layer's.
      algorithm: what computes it.
      multiplications: that the algorithm needs for one image.
      seconds: for one image; None where there is neither a cost model nor a measurement.
    """

    name: str
    algorithm: str
    multiplications: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """How the predictor computes the net.

    Attributes:
      batch_size: images a call.
      source: who chose the algorithms (`inference.plan.Plan.source`); None for an INT8 net, which has no plan.
      times_from: where the layers' times are from.
      layers: each convolution; none for an INT8 net.
      device: the machine's.
      net_seconds: measured for one image through the whole net; None if nothing was measured.
    """

    batch_size: int
    source: str | None
    times_from: Literal["cost model", "measurement"] | None
    layers: tuple[LayerTime, ...]
    device: str
    net_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image and what the net takes it for.

    Attributes:
      name: its file's, without what all images' paths have in common.
      jpeg: the image as the net sees it, small.
      guesses: the most likely classes, the likeliest first; none for a net without classifier.
    """

    name: str
    jpeg: bytes
    guesses: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """All of a page.

    Attributes:
      file: the weight file, as it was given.
      info: what the file says of itself.
      stages: cost of each stage and of the head.
      photos: the images, if any were given.
      images: how many images all measurements are of.
      pseudo_random: whether those are noise, because no images were given.
      listed: how many images there were to choose from; 0 if all were taken.
      unusable: how many images (or folders) could not be read or computed.
      differences: between computations of the outputs.
      weights, inputs: of each layer, from image to classifier.
      plan: how the predictor computes.
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
