"""The loop over a run's steps, with logging, evaluation, checkpoints and stops on request."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from repvgg_jax.files import uploaded_folder
from repvgg_jax.paths import Place
from repvgg_jax.storage import BucketPath

from .bucket_metrics import BucketMetricsLog
from .checkpoint import Checkpoints
from .cluster import Preemption
from .evaluate import Evaluation, Evaluator
from .metrics import MetricsLog, Row, SilentLog
from .mixing import mix
from .parallel import AXIS, parallel
from .progress import RunProgress
from .run import FORMS, Run, trained_forms
from .state import TrainState
from .step import make_train_step
from .tracker import Tracker
from .utilization import peak_flops, training_flops
from .window import Window

PROFILED_STEPS = range(10, 15)
"""Steps after the start that `--profile` traces, when compilation and warm-up are over."""


@dataclasses.dataclass(frozen=True)
class Watchers:
    """Receivers of a run's progress: evaluator, log, display, checkpoints and tracker."""

    evaluator: Evaluator
    log: MetricsLog | BucketMetricsLog | SilentLog
    progress: RunProgress
    checkpoints: Checkpoints
    check_workdir: Callable[[], None]
    tracker: Tracker | None = None

    def write(self, row: Row, prefix: str) -> None:
        """Write a row to the log and the tracker; TensorBoard and the tracker name its numbers `PREFIX/NAME`."""
        self.log.write(row, prefix)
        if self.tracker is not None:
            self.tracker.write(row, prefix)


def run_steps(
    run: Run, state: TrainState, start_step: int, batches: Iterator[Any], watchers: Watchers, preemption: Preemption
) -> tuple[TrainState, int]:
    """Take the run's steps from `start_step` on.

    Nothing between the steps changes the state, so the result does not depend on how often a run is logged and
    evaluated, or where it was interrupted.

    Returns:
      The state, which is saved, and the last step taken; that is an earlier one if the run was asked to stop.

    Raises:
      RepVGGError: the loss is not finite, or a checkpoint cannot be written.
    """
    step_function = make_parallel_step(run)
    options, total_steps = run.recipe.run, run.total_steps
    window = make_window(run)
    log_every = min(options.log_every, run.steps_per_epoch)
    trace = Trace(run.workdir / "profile", start_step) if options.profile else None
    evaluated = False
    for step in range(start_step + 1, total_steps + 1):
        batch = window.next(batches)
        state, metrics = step_function(state, batch)
        window.add(step, metrics)
        watchers.progress.advance(step)
        if trace is not None:
            trace.after(step, metrics)
        epoch, is_last = step / run.steps_per_epoch, step == total_steps

        if step % log_every == 0 or is_last:
            row = {"step": step, "epoch": round(epoch, 4), **window.close()}
            watchers.write(row, "train")
            watchers.progress.show(row)

        top1 = None
        if step % (run.steps_per_epoch * options.evaluate_every) == 0 and not is_last:
            window.check()
            top1 = evaluate(run, state, step, watchers)
            window.restart()
        stop = preemption.asked(step)
        if top1 is not None or stop or is_last or step % options.checkpoint_every == 0:
            window.check()
            watchers.check_workdir()
            watchers.log.flush()  # before the checkpoint, because steps after it are repeated, but not those before
            watchers.checkpoints.save(state, run.facts, top1)
            window.restart()
        if top1 is not None and not evaluated:  # the first evaluation compiles
            watchers.progress.time_from(step)
            evaluated = True
        if stop:
            watchers.checkpoints.wait()
            return state, step
    return state, total_steps


def make_parallel_step(run: Run, devices: Sequence[Any] | None = None) -> Any:
    """Return the run's train step on all devices, or on `devices`; it reuses the state's memory for its result."""
    return parallel(make_step(run), donate=True, devices=devices)


def make_step(run: Run) -> Callable[..., Any]:
    """Return the run's train step on one device."""
    options = run.recipe.optimizer
    mixing = None
    if options.mixup or options.cutmix:
        mixing = functools.partial(mix, mixup_alpha=options.mixup, cutmix_alpha=options.cutmix)
    return make_train_step(
        run.model,
        run.optimizer,
        run.schedule,
        run.dataset.preprocessing,
        label_smoothing=options.label_smoothing,
        auxiliary_weight=options.auxiliary_weight,
        mixing=mixing,
        accumulate=options.accumulate,
        ema_decay=options.ema_decay,
        seed=run.recipe.run.seed,
        axis_name=AXIS,
    )


def make_window(run: Run) -> Window:
    """Return a window that can compute the model FLOP utilisation."""
    peak = peak_flops(jax.devices()[0].device_kind, run.recipe.model.dtype)
    cost = training_flops(run.model.variant, run.dataset.train_size, run.dataset.num_classes)
    return Window(run.recipe.optimizer.batch_size, cost, None if peak is None else peak * jax.device_count())


def evaluate(run: Run, state: TrainState, step: int, watchers: Watchers) -> float:
    """Evaluate the trained weights and their moving average, and return the better top-1."""
    results = {form: watchers.evaluator(variables) for form, variables in trained_forms(state).items()}
    for form, result in results.items():
        record_evaluation(run, result, form, step, watchers)
    return max(result.top1 for result in results.values())


def record_evaluation(run: Run, result: Evaluation, form: str, step: int, watchers: Watchers) -> None:
    """Write an evaluation as one row to the log and as one line to the screen."""
    epoch = step / run.steps_per_epoch
    row = {"step": step, "epoch": epoch, "form": form}
    row |= {name: getattr(result, name) for name in ("top1", "top5", "loss", "images")}
    watchers.write(row, f"test_{form}")
    watchers.progress.note(f"epoch {epoch:g}: {FORMS[form].title}, {evaluation_text(result, run.dataset.num_classes)}")


def evaluation_text(result: Evaluation, num_classes: int) -> str:
    """Return an evaluation's numbers in words, without top-5 where it is always 100 %."""
    top5 = f", top-5 {100 * result.top5:.2f} %" if num_classes > 5 else ""
    return f"top-1 {100 * result.top1:.2f} %{top5}, loss {result.loss:.4f}, {result.images} test images"


class Trace:
    """A JAX profiler trace of `PROFILED_STEPS` after the start."""

    def __init__(self, folder: Place, start_step: int):
        self._folder, self._start_step = folder, start_step
        self._written = contextlib.ExitStack()

    def after(self, step: int, metrics: Any) -> None:
        """Start the trace before the first of these steps and stop it after the last."""
        done = step - self._start_step
        if done == PROFILED_STEPS.start:
            jax.block_until_ready(metrics)
            folder = self._folder
            if isinstance(folder, BucketPath):
                folder = self._written.enter_context(uploaded_folder(folder))
            jax.profiler.start_trace(str(folder))
        elif done == PROFILED_STEPS.stop:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._written.close()
