"""Plans for deploy-form nets: the algorithm of each layer, and the portions in which a batch is processed.

`default_plan` uses a small cost model and returns immediately; `tuning` measures instead. On accelerators, a plan uses
XLA's convolution for every layer.

Portions matter on CPUs for two reasons. Intermediate results that stay in a core's cache are cheap to read again, and
newly allocated memory costs a page fault per 4 KiB, which outweighs the arithmetic of the first layers. glibc keeps
freed blocks of up to 32 MiB for the next call and returns larger ones to the system. So `outer` images at a time go
through the whole net, and each stage in turn processes them `portion` images at a time.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from ..conv.algorithm import ALGORITHMS, candidates
from ..conv.cost import LayerShape
from ..net.variants import Variant
from ..text_table import text_table

OUTER = 16
"""Largest number of images that go through the whole net together: enough rows for late layers' matrix products."""

OUTER_BYTES = 28 << 20
"""Largest input and output of a layer, in bytes, for the images that go through the whole net together: the block that
XLA allocates in a call is a little larger, and should be smaller than 32 MiB."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Shape and algorithm of the block called `name`."""

    name: str
    shape: LayerShape
    algorithm: str


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Consecutive layers that process `portion` images at a time."""

    portion: int
    layers: tuple[LayerPlan, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan for computing one batch with one net; `str(plan)` is a table.

    Attributes:
      batch_size: images per call.
      outer: images that go through all stages together; the last group of a call may be padded with blank images.
      stages: stages in order; each portion divides `outer`.
      source: origin of the plan: "cost model", "measured", "cached measurement", or the platform's name.
    """

    batch_size: int
    outer: int
    stages: tuple[StagePlan, ...]
    source: str

    def algorithms(self) -> dict[str, str]:
        """Return the algorithm of every block by its name."""
        return {layer.name: layer.algorithm for stage in self.stages for layer in stage.layers}

    def __str__(self) -> str:
        rows = [("block", "input", "channels", "stride", "groups", "algorithm", "images", "G multiplications")]
        for stage in self.stages:
            for layer in stage.layers:
                shape = layer.shape
                rows.append(
                    (
                        layer.name,
                        f"{shape.height}x{shape.width}",
                        f"{shape.in_channels} -> {shape.out_channels}",
                        str(shape.stride),
                        str(shape.groups),
                        layer.algorithm,
                        str(stage.portion),
                        f"{self._multiplications(layer):.3f}",
                    )
                )
        direct = sum(layer.shape.multiplications() for stage in self.stages for layer in stage.layers) / 1e9
        planned = sum(self._multiplications(layer) for stage in self.stages for layer in stage.layers)
        total = f"batch {self.batch_size}, {self.outer} at a time; {planned:.2f} G multiplications per image"
        return "\n".join([*text_table(rows), "", f"{total} (direct: {direct:.2f}); source: {self.source}"])

    @staticmethod
    def _multiplications(layer: LayerPlan) -> float:
        return layer.shape.multiplications(ALGORITHMS[layer.algorithm].tile) / 1e9


def stage_layers(variant: Variant, image_size: tuple[int, int], in_channels: int = 3) -> list[list[LayerPlan]]:
    """Return the net's convolutions with their shapes, grouped by stage. All have the algorithm "direct"."""
    height, width = image_size
    stages: dict[str, list[LayerPlan]] = {}
    for block in variant.blocks(in_channels):
        channels = (block.in_channels, block.out_channels)
        shape = LayerShape(height, width, *channels, block.stride, block.groups, block.dilation)
        stages.setdefault(block.stage, []).append(LayerPlan(block.name, shape, "direct"))
        height, width = math.ceil(height / block.stride), math.ceil(width / block.stride)
    return list(stages.values())


def xla_plan(variant: Variant, batch_size: int, image_size: tuple[int, int], in_channels: int, source: str) -> Plan:
    """Return the plan for GPU, TPU and 16-bit floats: XLA's convolution for every layer, the whole batch at once."""
    stages = (StagePlan(batch_size, tuple(layers)) for layers in stage_layers(variant, image_size, in_channels))
    return Plan(batch_size, batch_size, tuple(stages), source)


def default_plan(
    variant: Variant, batch_size: int, image_size: tuple[int, int], in_channels: int = 3, *, dtype: str = "float32"
) -> Plan:
    """Return the cost model's plan for a CPU: for each stage, the fastest portion and algorithms by estimate."""
    by_stage = stage_layers(variant, image_size, in_channels)
    outer = outer_portion(batch_size, [layer.shape for layers in by_stage for layer in layers], dtype)

    def best(shape: LayerShape, portion: int) -> tuple[str, float]:
        costs = [(algorithm.name, algorithm.seconds(shape, portion)) for algorithm in candidates(shape, dtype)]
        return min(costs, key=lambda pair: pair[1])

    stages = []
    for layers in by_stage:
        portions = {p: sum(best(layer.shape, p)[1] for layer in layers) for p in divisors(outer)}
        portion = min(portions, key=lambda p: portions[p])
        chosen = (dataclasses.replace(layer, algorithm=best(layer.shape, portion)[0]) for layer in layers)
        stages.append(StagePlan(portion, tuple(chosen)))
    return Plan(batch_size, outer, tuple(stages), "cost model")


def outer_portion(batch_size: int, shapes: Sequence[LayerShape], dtype: str) -> int:
    """Return the number of images that go through the net together, within both limits.

    The last group is padded with blank images. A group takes about half an image longer than its images, since it reads
    the weights again.
    """
    numbers = max(
        shape.height * shape.width * shape.in_channels + shape.out_pixels * shape.out_channels for shape in shapes
    )
    most = min(OUTER, batch_size, max(1, OUTER_BYTES // (numbers * jnp.dtype(dtype).itemsize)))
    return min(range(most, 0, -1), key=lambda outer: math.ceil(batch_size / outer) * (outer + 0.5))


def divisors(number: int) -> list[int]:
    """Return the divisors in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def portion_choices(outer: int) -> Sequence[int]:
    """Return the portions to measure: at most five, spread over the divisors."""
    choices = divisors(outer)
    while len(choices) > 5:
        del choices[len(choices) // 2]
    return choices
