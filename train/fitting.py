"""A run's train step compiled for devices, which need not be here; and the largest batch that fits their memory."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .compiled import Cost, program_cost
from .loop import make_parallel_step
from .run import Run, batch_shapes, fresh_state, make_run
from .state import TrainState
from .targets import COMPILER_OPTIONS

MAX_COMPILATIONS = 8
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
    per_chip = run.recipe.optimizer.batch_size // len(devices)
    of_batch = tree_bytes(batch_shapes(run, per_chip))
    prefetched = run.recipe.input.prefetch * of_batch
    start = time.monotonic()
    try:
        program = compiled_program(run, devices, platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        given = tree_bytes(state_shapes(run)) + of_batch
        needed = needed_bytes(str(error), given)
        return Compiled(per_chip, needed + prefetched if needed else 0, time.monotonic() - start)
    seconds = time.monotonic() - start
    sizes = program.memory_analysis()
    assert sizes is not None
    memory = Memory(
        state=sizes.argument_size_in_bytes - of_batch,
        batch=of_batch,
        prefetched=prefetched,
        temporaries=sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
    )
    cost = program_cost(program.as_text() or "", on_chip=platform == "tpu")
    return Compiled(per_chip, memory.peak, seconds, memory, cost)


def compiled_program(run: Run, devices: Sequence[Any], platform: str) -> jax.stages.Compiled:
    """Compile a run's train step for `devices`.

    Raises:
      JaxRuntimeError: a TPU's compiler cannot fit it into the memory.
    """

    batch = batch_shapes(run, run.recipe.optimizer.batch_size // len(devices))
    shapes = shapes_on(len(devices), (state_shapes(run), batch))
    lowered = make_parallel_step(run, devices).lower(*shapes)
    return lowered.compile(compiler_options=COMPILER_OPTIONS.get(platform, {}))


def state_shapes(run: Run) -> TrainState:
    """Return one chip's state without its numbers."""
    return jax.eval_shape(lambda: fresh_state(run))


def shapes_on(devices: int, tree: Any) -> Any:
    """Return the shapes of a tree with an axis of so many devices in front."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), tree)


def tree_bytes(tree: Any) -> float:
    """Return the bytes of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds")


def needed_bytes(message: str, given: float = 0) -> float:
    """Return how much memory a compiler that ran out of it had needed, from its message; 0 if it does not say.

    Args:
      message: of the compiler.
      given: bytes of the program's arguments, which some messages leave out.
    """
    for pattern, besides in ((_USED, 0), (_TEMPORARIES, given)):
        found = pattern.search(message)
        if found is not None:
            return float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " ")) + besides
    return 0


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
    """Search for the largest share of a batch that a chip can take, to within a sixteenth of it.

    Memory grows about linearly with the batch: the next one to try lies where the line through two others ends at
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
        images = _next_share(tried, usable, step, most)
        if images is None:
            break
        tried.append(compiled(images))
    low, high = _bounds(tried, usable)
    return Largest(low, high, low is None or low.per_chip < most)


def _bounds(tried: Sequence[Compiled], usable: float) -> tuple[Compiled | None, Compiled | None]:
    """The largest share that fits, and the smallest that does not."""
    low = max((c for c in tried if c.fits(usable)), key=lambda c: c.per_chip, default=None)
    high = min((c for c in tried if not c.fits(usable)), key=lambda c: c.per_chip, default=None)
    return low, high


def _next_share(tried: Sequence[Compiled], usable: float, step: int, most: int) -> int | None:
    """Images to try next; None if the largest share is known well enough."""
    low, high = _bounds(tried, usable)
    if low is not None and low.peak >= (1 - CLOSE_ENOUGH) * usable:
        return None
    bottom, top = low.per_chip if low else 0, high.per_chip if high else most + step
    images = guess(tried, usable)
    if low and high and _halving_is_due(tried, usable):
        images = (bottom + top) / 2
    # Round numbers: hardware likes them, and TPUs pad a share to a multiple of 128, so that memory grows in steps.
    unit = step * 2 ** max(int(math.log2(max((bottom or images) / step / 16, 1))), 0)
    if low and top - bottom <= unit:
        return None
    images = max(int(images // unit * unit), bottom + unit)
    images = max(min(images, top - (unit if high else step)), step)
    return images if bottom < images < top else None


def _halving_is_due(tried: Sequence[Compiled], usable: float) -> bool:
    """Whether the last two tries both fitted or both failed: memory does not grow as the line through them says."""
    return len(tried) > 2 and tried[-1].fits(usable) == tried[-2].fits(usable)


def guess(tried: Sequence[Compiled], usable: float) -> float:
    """Return how many images should just fit.

    The line goes through the largest share that fits and the smallest that does not, or, where there are no such two,
    through the two that came nearest; of one alone, by proportion.
    """
    known = sorted((c for c in tried if c.peak > 0), key=lambda c: abs(c.peak - usable))
    if not known:
        return min(c.per_chip for c in tried) / 2
    around = [c for c in _bounds(known, usable) if c is not None]
    a, b = around if len(around) == 2 else (known * 2)[:2]
    if a.peak == b.peak:
        return a.per_chip * usable / a.peak
    return a.per_chip + (usable - a.peak) * (b.per_chip - a.per_chip) / (b.peak - a.peak)
