"""Training: `python -m train.main --preset NAME [options]`. The same command again resumes.

recipe -> data set -> batches [devices, per_device, H, W, C] -> train_step -> TrainState -> checkpoints -> weight files.
"""

if __name__ == "__main__":  # before the imports that take long: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("train.main", huge_pages=True)

import contextlib
import dataclasses
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
from .run import Run, fresh_state, make_evaluator, set_up, training_batches
from .workdir import claimed


def main() -> None:
    """The command; its last line on stdout is one JSON object."""
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
        if jax.process_count() > 1:  # a collective failed: nobody is left to agree with on an orderly end
            cluster.abandon(error)
        raise
    except RepVGGError as error:
        if jax.process_count() > 1:  # the others wait for this one in a collective: do not wait for them
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        raise
    if result is None:
        sys.exit(128 + cluster.stop_signal())  # as a shell reports it
    if cluster.is_leader():
        print(json.dumps(result.summary()))


def train(recipe: Recipe) -> Result | None:
    """Train from start, or from the newest checkpoint in the run's workdir, to the end.

    Returns:
      The result, or None if a signal stopped the run (`cluster.Preemption`); its state is saved then.

    Raises:
      RepVGGError: bad options, unreadable data, a workdir that cannot be used, or a loss that is not finite.
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
        state = checkpoints.restore(fresh_state(run), run.facts)
        start_step = int(to_host(state.step))
        progress.start(start_step)
        for line in (*run.dataset.notes, opening_line(run, start_step)):
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
                "the same command again goes on from there"
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
    """Return this process's log, a context manager: of several, the first one alone writes."""
    if not cluster.is_leader():
        return SilentLog()
    finished = start_step == run.total_steps
    if isinstance(run.workdir, BucketPath):
        return BucketMetricsLog(run.workdir, start_step, finished=finished, note=note)
    return MetricsLog(run.workdir, start_step, finished=finished, note=note)


def opening_line(run: Run, start_step: int) -> str:
    """Return what is about to run, in one line."""
    devices, processes = jax.devices(), jax.process_count()
    begin = f"resuming at step {start_step}" if start_step else f"{run.total_steps} steps"
    machines = f" in {processes} processes" if processes > 1 else ""
    return (
        f"{run.model.variant.name} on {run.recipe.input.data}: {len(run.dataset.train)} training and "
        f"{len(run.dataset.test)} test images, {run.dataset.num_classes} classes; "
        f"{len(devices)} {devices[0].device_kind} device(s){machines}; {begin}; {run.workdir}"
    )


def short(error: Exception) -> str:
    """Return an error's text on one line of bounded length."""
    return " ".join(str(error).split())[:200]
