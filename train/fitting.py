"""A run's train step compiled for devices, which need not be here; and the largest batch that fits their memory."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .compiled import Cost, program_cost
from .loop import make_parallel_step
from .run import Run, batch_shapes, fresh_state, make_run
from .targets import COMPILER_OPTIONS

MAX_COMPILATIONS = 6
"""That a search for the largest batch may take."""

CLOSE_ENOUGH = 0.02
"""A batch that leaves so little of the memory free is taken for the largest, without a look at the ones above it."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's memory while it takes a step.

    Attributes:
      state: parameters, BN statistics, the optimizer's state and moving averages.
      batch: the step's own.
      prefetched: batches that wait for the steps to come.
      temporaries: activations, gradients, workspaces.
      program: the compiled code, where it lies there.
    """

    state: float
    batch: float
    prefetched: float
    temporaries: float
    program: float

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A run's step, compiled for a target.

    Attributes:
      per_chip: images of each chip's share of the batch.
      peak: bytes that each chip needs; of a step that the compiler could not fit, by its own words, which need not
        count everything.
      seconds: that the compilation took.
      memory, cost: None if the compiler could not fit it.
    """

    per_chip: int
    peak: float
    seconds: float
    memory: Memory | None = None
    cost: Cost | None = None

    def fits(self, usable: float) -> bool:
        """Whether a chip with so many usable bytes can take it."""
        return self.memory is not None and self.peak <= usable


def with_batch(run: Run, batch_size: int) -> Run:
    """Return the run at another global batch."""
    if batch_size == run.recipe.optimizer.batch_size:
        return run
    optimizer = dataclasses.replace(run.recipe.optimizer, batch_size=batch_size)
    return make_run(dataclasses.replace(run.recipe, optimizer=optimizer), run.dataset)


def compile_step(run: Run, devices: Sequence[Any], platform: str) -> Compiled:
    """Compile a run's train step for `devices` and read from the result what it costs."""
    count, per_chip = len(devices), run.recipe.optimizer.batch_size // len(devices)

    def on_every_device(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)

    state = jax.eval_shape(lambda: fresh_state(run))
    batch = batch_shapes(run, per_chip)
    start = time.monotonic()
    lowered = make_parallel_step(run, devices).lower(on_every_device(state), on_every_device(batch))
    try:
        program = lowered.compile(compiler_options=COMPILER_OPTIONS.get(platform, {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(per_chip, needed_bytes(str(error)), time.monotonic() - start)
    seconds = time.monotonic() - start
    sizes = program.memory_analysis()
    of_batch = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    assert sizes is not None
    memory = Memory(
        state=sizes.argument_size_in_bytes - of_batch,
        batch=of_batch,
        prefetched=run.recipe.input.prefetch * of_batch,
        temporaries=sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
    )
    cost = program_cost(program.as_text() or "", on_chip=platform == "tpu")
    return Compiled(per_chip, memory.peak, seconds, memory, cost)


_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of|required[^()]*\(([\d.]+)([KMGT]?)\) exceeds")


def needed_bytes(message: str) -> float:
    """Return how much memory a compiler that ran out of it had needed, from its message; 0 if it does not say."""
    found = _NEEDED.search(message)
    if found is None:
        return 0
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that was found to fit.

    Attributes:
      fitting: at that batch; None if not even the smallest fits.
      failing: the smallest that does not fit; None if none was met.
      memory_limit: whether memory is what limits it, and not the number of training images.
    """

    fitting: Compiled | None
    failing: Compiled | None
    memory_limit: bool = True


def find_largest(
    compiled: Callable[[int], Compiled], asked: Compiled, usable: float, *, step: int, most: int
) -> Largest:
    """Search for the largest share of a batch that a chip can take.

    Memory grows about linearly with the batch: the next one to try lies where the line through the last two ends at
    what is usable, and a compilation says whether that is so.

    Args:
      compiled: compiles the step for so many images a chip.
      asked: at the batch that was asked for.
      usable: bytes of a chip.
      step: images that a share must be a multiple of.
      most: images that a share can have at most.
    """
    tried = [asked]
    most -= most % step
    for _ in range(MAX_COMPILATIONS):
        low = max((c for c in tried if c.fits(usable)), key=lambda c: c.per_chip, default=None)
        high = min((c for c in tried if not c.fits(usable)), key=lambda c: c.per_chip, default=None)
        if low is not None and low.peak >= (1 - CLOSE_ENOUGH) * usable:
            break
        least = low.per_chip + step if low else step
        end = high.per_chip - step if high else most
        if least > end:
            break
        images = guess(tried, usable, step)
        if low and high and not least <= images <= end:  # memory does not grow as it should: halve what is left
            images = (least + end) // 2 // step * step
        tried.append(compiled(min(max(images, least), end)))
    low = max((c for c in tried if c.fits(usable)), key=lambda c: c.per_chip, default=None)
    high = min((c for c in tried if not c.fits(usable)), key=lambda c: c.per_chip, default=None)
    return Largest(low, high, low is None or low.per_chip < most)


def guess(tried: Sequence[Compiled], usable: float, step: int) -> int:
    """Return how many images should just fit, by the two tries that came nearest to it, or by proportion from one.

    Shares of 64 or more are rounded to a multiple of 8 steps, as hardware likes them.
    """
    known = sorted((c for c in tried if c.peak > 0), key=lambda c: abs(c.peak - usable))
    if not known:
        images = min(c.per_chip for c in tried) / 2
    elif len(known) == 1 or known[0].peak == known[1].peak:
        images = known[0].per_chip * usable / known[0].peak
    else:
        a, b = known[:2]
        images = a.per_chip + (usable - a.peak) * (b.per_chip - a.per_chip) / (b.peak - a.peak)
    unit = 8 * step if images >= 64 * step else step
    return int(images // unit * unit)
