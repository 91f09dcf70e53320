"""Compile a run's train step for devices, which need not be present, and find the largest batch that fits them."""

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
"""Most compilations that a search for the largest batch may take."""

CLOSE_ENOUGH = 0.02
"""A batch that leaves no more than this share of the memory free counts as the largest; no larger one is tried."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Use of one chip's memory during a step, in bytes.

    Attributes:
      state: parameters, BN statistics, the optimizer's state and moving averages.
      batch: the step's batch.
      prefetched: batches of the next steps.
      temporaries: activations, gradients, workspaces.
      program: the compiled code, if it is in this memory.
    """

    state: float
    batch: float
    prefetched: float
    temporaries: float
    program: float

    @property
    def peak(self) -> float:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A run's step, compiled for a target.

    Attributes:
      per_chip: images per chip.
      peak: bytes that each chip needs; if the compiler could not fit the step, as it reports them, which may omit some.
      seconds: duration of the compilation.
      memory: None if the compiler could not fit the step.
      cost: None if the compiler could not fit the step.
    """

    per_chip: int
    peak: float
    seconds: float
    memory: Memory | None = None
    cost: Cost | None = None

    def fits(self, usable: float) -> bool:
        """Return whether a chip with `usable` bytes can run the step."""
        return self.memory is not None and self.peak <= usable


def with_batch(run: Run, batch_size: int) -> Run:
    """Return the run with another global batch size."""
    if batch_size == run.recipe.optimizer.batch_size:
        return run
    optimizer = dataclasses.replace(run.recipe.optimizer, batch_size=batch_size)
    return make_run(dataclasses.replace(run.recipe, optimizer=optimizer), run.dataset)


def compile_step(run: Run, devices: Sequence[Any], platform: str) -> Compiled:
    """Compile a run's train step for `devices` and read its cost from the compiled program."""
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
    """Return the shapes and dtypes of one chip's state."""
    return jax.eval_shape(lambda: fresh_state(run))


def shapes_on(devices: int, tree: Any) -> Any:
    """Return the shapes of a tree with a leading axis of devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype), tree)


def tree_bytes(tree: Any) -> float:
    """Return the total bytes of a tree of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds")


def needed_bytes(message: str, given: float = 0) -> float:
    """Return the bytes that a compiler would have needed, from its out-of-memory message; 0 if it does not say.

    Args:
      message: message of the compiler.
      given: bytes of the program's arguments, which some messages omit.
    """
    for pattern, extra in ((_USED, 0), (_TEMPORARIES, given)):
        match = pattern.search(message)
        if match is not None:
            return float(match[1]) * 2 ** (10 * " KMGT".index(match[2] or " ")) + extra
    return 0


@dataclasses.dataclass(frozen=True)
class Largest:
    """Result of the search for the largest batch that fits.

    Attributes:
      fitting: step at the largest batch that fits; None if not even the smallest fits.
      failing: step at the smallest batch that does not fit; None if all fitted.
      memory_limit: whether memory limits the batch, and not the number of training images.
    """

    fitting: Compiled | None
    failing: Compiled | None
    memory_limit: bool = True


def find_largest(
    compiled: Callable[[int], Compiled], asked: Compiled, usable: float, *, step: int, most: int
) -> Largest:
    """Search for the largest number of images per chip that fits, to within a sixteenth of it.

    Memory grows about linearly with the batch. The next batch to try is where the line through two tried ones reaches
    the usable memory; compiling it shows whether it fits.

    Args:
      compiled: function that compiles the step for a number of images per chip.
      asked: step at the batch size of the recipe.
      usable: usable bytes per chip.
      step: number of which the images per chip must be a multiple.
      most: largest number of images per chip.
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
    """Return the largest step that fits, and the smallest that does not."""
    low = max((c for c in tried if c.fits(usable)), key=lambda c: c.per_chip, default=None)
    high = min((c for c in tried if not c.fits(usable)), key=lambda c: c.per_chip, default=None)
    return low, high


def _next_share(tried: Sequence[Compiled], usable: float, step: int, most: int) -> int | None:
    """Return the images per chip to try next; None if the largest number is known closely enough."""
    low, high = _bounds(tried, usable)
    if low is not None and low.peak >= (1 - CLOSE_ENOUGH) * usable:
        return None
    bottom, top = low.per_chip if low else 0, high.per_chip if high else most + step
    images = guess(tried, usable)
    if low and high and _halving_is_due(tried, usable):
        images = (bottom + top) / 2
    # Round numbers run faster, and TPUs pad the images per chip to a multiple of 128, so memory grows in steps.
    unit = step * 2 ** max(int(math.log2(max((bottom or images) / step / 16, 1))), 0)
    if low and top - bottom <= unit:
        return None
    images = max(int(images // unit * unit), bottom + unit)
    images = max(min(images, top - (unit if high else step)), step)
    return images if bottom < images < top else None


def _halving_is_due(tried: Sequence[Compiled], usable: float) -> bool:
    """Return whether the last two tries both fitted or both failed, so memory does not follow the line."""
    return len(tried) > 2 and tried[-1].fits(usable) == tried[-2].fits(usable)


def guess(tried: Sequence[Compiled], usable: float) -> float:
    """Return the number of images per chip that should just fit.

    It is on the line through the largest number that fits and the smallest that does not, or else through the two that
    came nearest to the limit. With one try only, it is proportional.
    """
    measured = sorted((c for c in tried if c.peak > 0), key=lambda c: abs(c.peak - usable))
    if not measured:
        return min(c.per_chip for c in tried) / 2
    around = [c for c in _bounds(measured, usable) if c is not None]
    a, b = around if len(around) == 2 else (measured * 2)[:2]
    if a.peak == b.peak:
        return a.per_chip * usable / a.peak
    return a.per_chip + (usable - a.peak) * (b.per_chip - a.per_chip) / (b.peak - a.peak)
