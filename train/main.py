"""Train a net: `python -m train.main --preset NAME [options]`. Repeating the command resumes the run.

recipe -> data set -> batches [devices, per_device, H, W, C] -> train_step -> TrainState -> checkpoints -> weight files.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("train.main", huge_pages=True)

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable

import jax

from repvgg_jax.errors import RepVGGError
from repvgg_jax.storage import BucketPath

from . import cluster, tracker
from .bucket_metrics import BucketMetricsLog
from .checkpoint import Checkpoints
from .data import Prefetch
from .end import Result, finish
from .evaluate import skipped_line
from .loop import Watchers, run_steps
from .metrics import MetricsLog, SilentLog
from .parallel import put_batch, to_host
from .plot import plot_curves
from .preflight import preflight
from .presets import parse
from .progress import RunProgress
from .recipe import Recipe
from .run import Run, fresh_state, make_evaluator, set_up, training_batches, whitened
from .workdir import claimed


def main() -> None:
    """Run the command; the last line on stdout is one JSON object."""
    recipe = parse()
    if recipe.run.preflight is not None:
        sys.exit(preflight(recipe, recipe.run.preflight))
    try:
        result = train(recipe)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and jax.process_count() == 1:
            raise RepVGGError(
                f"out of memory ({short(error)}); use a smaller --batch-size, a larger --accumulate, or --remat"
            ) from error
        if jax.process_count() > 1:  # a collective failed, so the processes cannot agree on an orderly end
            cluster.abandon(error)
        raise
    except RepVGGError as error:
        if jax.process_count() > 1:  # the others wait for this one in a collective, so do not wait for them
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        raise
    if result is None:
        sys.exit(128 + cluster.stop_signal())  # the exit status that shells use
    if cluster.is_leader():
        print(json.dumps(result.summary()))


def train(recipe: Recipe) -> Result | None:
    """Train from the newest checkpoint in the run's workdir, or else from the start, to the end.

    Returns:
      The result, or None if a signal stopped the run (`cluster.Preemption`) after its state was saved.

    Raises:
      RepVGGError: an option is invalid, the data cannot be read, the workdir cannot be used, or the loss is not finite.
    """
    cluster.start(recipe.cluster)
    tracked = recipe.run.tracker != "none" and cluster.is_leader()
    if tracked:
        tracker.check_installed()
    run = set_up(recipe)
    with (
        claimed(recipe, run.workdir) as check_workdir,
        RunProgress(run.total_steps, run.steps_per_epoch, shown=cluster.is_leader()) as progress,
        Checkpoints(run.workdir, recipe.run.keep_checkpoints, progress.note) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        state = checkpoints.restore(fresh_state(run), run.facts, functools.partial(whitened, run))
        start_step = int(to_host(state.step))
        progress.start(start_step)
        for line in (*run.dataset.notes, *left_over(run), opening_line(run, start_step)):
            progress.note(line)

        log = stack.enter_context(open_log(run, start_step, progress.note))
        watchers = Watchers(make_evaluator(run, run.model), log, progress, checkpoints, check_workdir)
        if tracked:
            begun = stack.enter_context(tracker.Tracker(run.workdir, start_step, progress.note))
            watchers = dataclasses.replace(watchers, tracker=begun)
        with (
            training_batches(run, start_step) as batches,
            Prefetch(batches, put_batch, recipe.input.prefetch) as on_device,
            cluster.Preemption() as preemption,
        ):
            state, reached = run_steps(run, state, start_step, on_device, watchers, preemption)
            checkpoints.wait()
        if preemption.stopping():
            progress.note(
                f"{cluster.stop_signal().name}: stopped after step {reached}, state saved; "
                "run the same command again to resume"
            )
            return None
        result = finish(run, state, watchers)
        log.flush()
        skipped = batches.skipped + result.evaluations["train"].skipped
        if skipped:
            progress.note(skipped_line(skipped))
        if cluster.is_leader():
            progress.note(f"curves: {plot_curves([run.workdir], run.workdir / 'curves.png')}")
    cluster.barrier("finished")
    return result


def open_log(run: Run, start_step: int, note: Callable[[str], object]) -> MetricsLog | BucketMetricsLog | SilentLog:
    """Return this process's log, a context manager; only the first of several processes writes."""
    if not cluster.is_leader():
        return SilentLog()
    finished = start_step == run.total_steps
    if isinstance(run.workdir, BucketPath):
        return BucketMetricsLog(run.workdir, start_step, finished=finished, note=note)
    return MetricsLog(run.workdir, start_step, finished=finished, note=note)


def left_over(run: Run) -> list[str]:
    """Return a line on the images that an epoch leaves out, if they are more than one in twenty."""
    images, batch_size = len(run.dataset.train), run.recipe.optimizer.batch_size
    rest = images - run.steps_per_epoch * batch_size
    if rest * 20 <= images:
        return []
    steps = "one step" if run.steps_per_epoch == 1 else f"{run.steps_per_epoch} steps"
    return [f"an epoch is {steps} of {batch_size} images; the {rest} left over are other ones in each epoch"]


def opening_line(run: Run, start_step: int) -> str:
    """Return a one-line description of the run that is about to start."""
    devices, processes = jax.devices(), jax.process_count()
    begin = f"resuming at step {start_step}" if start_step else f"{run.total_steps} steps"
    if start_step == run.total_steps:
        begin = f"all {run.total_steps} steps are done already: evaluating, and writing the weight files again"
    machines = f" in {processes} processes" if processes > 1 else ""
    kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
    return (
        f"{run.model.variant.name} on {run.recipe.input.data}: {len(run.dataset.train)} training and "
        f"{len(run.dataset.test)} test images, {run.dataset.num_classes} classes; "
        f"{len(devices)} {kind} device{'s' * (len(devices) > 1)}{machines}; {begin}; {run.workdir}"
    )


def short(error: Exception) -> str:
    """Return an error's text as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
