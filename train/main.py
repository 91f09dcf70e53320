"""Training: `python -m train.main --preset NAME [options]`. The same command again resumes.

config -> data set -> batches [devices, per_device, H, W, C] -> train_step -> TrainState -> checkpoints -> weight files.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.errors import ConfigError, RepVGGError
from repvgg_jax.weights import save_weights

from . import data
from .checkpoint import Checkpoints
from .config import Config, parse, save_or_compare
from .evaluate import Evaluation, Evaluator
from .metrics import MetricsLog
from .optimizer import learning_rate_schedule, make_optimizer
from .parallel import AXIS, average_batch_stats, parallel, per_device_batch, replicate, unreplicate
from .plot import plot_curves
from .progress import RunProgress
from .state import TrainState, create_state
from .step import make_train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: its evaluation in both forms, and where its weights are."""

    train: Evaluation
    deploy: Evaluation
    final_weights: Path
    deploy_weights: Path


def train(config: Config) -> Result:
    """Train from start, or from the newest checkpoint in the run's workdir, to the end.

    Raises:
      RepVGGError: bad options, unreadable data, a workdir that cannot be used, or a loss that is not finite.
    """
    options = config.optimizer
    per_device_batch(options.batch_size)
    dataset = data.load(config.input.data, image_size=config.input.test_image_size, data_dir=config.input.data_dir)
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), options.batch_size)
    total_steps = options.epochs * steps_per_epoch
    workdir = make_workdir(config)

    model = rv.create_model(
        config.model.model, dataset.num_classes, dtype=np.dtype(config.model.dtype), remat=config.model.remat
    )
    schedule = learning_rate_schedule(options, steps_per_epoch)
    optimizer = make_optimizer(options, schedule)
    train_step = make_train_step(
        model,
        optimizer,
        schedule,
        dataset.preprocessing,
        label_smoothing=options.label_smoothing,
        auxiliary_weight=options.auxiliary_weight,
        axis_name=AXIS,
    )
    parallel_step = parallel(train_step, donate=True)
    evaluator = make_evaluator(model, dataset, config)

    checkpoints = Checkpoints(workdir, config.run.keep_checkpoints)
    size = config.input.image_size
    fresh = create_state(model, optimizer, config.run.seed, (size, size, dataset.preprocessing.channels))
    restored = checkpoints.restore(fresh)
    start_step = int(restored.step)
    state = replicate(restored)
    del fresh, restored

    log = MetricsLog(workdir, start_step)
    batches = data.train_batches(
        dataset.train,
        batch_size=options.batch_size,
        local_device_count=jax.local_device_count(),
        transform=data.get_transform(dataset.train_transform),
        preprocessing=dataclasses.replace(dataset.preprocessing, image_size=size),
        seed=config.run.seed,
        start_step=start_step,
        num_workers=config.input.workers,
        strict=config.input.strict,
    )
    with RunProgress(start_step, total_steps, steps_per_epoch) as progress, batches:
        progress.note(opening_line(config, dataset, start_step, total_steps))
        window = Window()
        for step in range(start_step + 1, total_steps + 1):
            state, metrics = parallel_step(state, next(batches))
            window.add(metrics)
            progress.advance(step)
            epoch = step / steps_per_epoch
            if step % config.run.log_every == 0 or step == total_steps:
                row = {"step": step, "epoch": round(epoch, 4), **window.close(options.batch_size)}
                stop_unless_finite(row)
                log.write(row, "train")
                progress.show(row)

            evaluate_now = step % (steps_per_epoch * config.run.evaluate_every) == 0 and step < total_steps
            if evaluate_now or step % config.run.checkpoint_every == 0 or step == total_steps:
                state = average_batch_stats(state)
                if evaluate_now:
                    record_evaluation(evaluator(state.variables), "train", step, epoch, log, progress)
                checkpoints.save(unreplicate(state))
                window.restart()
        checkpoints.close()

        final = jax.device_get(unreplicate(state))
        result = finish(model, final, dataset, config, workdir, evaluator, log, progress)
        log.close()
        skipped = batches.skipped + result.train.skipped
        if skipped:
            progress.note(f"{skipped} images could not be read and were skipped")
        progress.note(f"curves: {plot_curves(workdir)}")
    return result


def finish(
    model: rv.RepVGG,
    state: TrainState,
    dataset: data.DataSet,
    config: Config,
    workdir: Path,
    evaluator: Evaluator,
    log: MetricsLog,
    progress: RunProgress,
) -> Result:
    """Write both weight files and evaluate both forms."""
    paths = workdir / "final.safetensors", workdir / "deploy.safetensors"
    deploy_model, deploy_variables = rv.to_deploy(model, state.variables)
    described: dict[str, Any] = dict(preprocessing=dataset.preprocessing, class_names=tuple(dataset.class_names))
    save_weights(paths[0], model, state.variables, **described)
    save_weights(paths[1], deploy_model, deploy_variables, **described)

    step, epoch = int(state.step), float(config.optimizer.epochs)
    trained = evaluator(replicate(state.variables))
    fused = make_evaluator(deploy_model, dataset, config)(replicate(deploy_variables))
    record_evaluation(trained, "train", step, epoch, log, progress)
    record_evaluation(fused, "deploy", step, epoch, log, progress)
    same = int((trained.predictions == fused.predictions).sum())
    progress.note(f"fused and training form agree on {same} of {trained.images} test images")
    progress.note(f"weights: {paths[0]} (training form), {paths[1]} (deploy form)")
    return Result(trained, fused, *paths)


def make_evaluator(model: rv.RepVGG, dataset: data.DataSet, config: Config) -> Evaluator:
    """Evaluation of `model` on the data set's evaluation split."""
    return Evaluator(
        model,
        dataset.test,
        dataset.preprocessing,
        batch_size=config.optimizer.batch_size,
        workers=config.input.workers,
        strict=config.input.strict,
    )


def make_workdir(config: Config) -> Path:
    """Create the run's folder, with its config.json.

    Raises:
      RepVGGError: it cannot be created or written to.
      ConfigError: it holds a run with other options.
    """
    workdir = Path(config.run.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepVGGError(f"cannot create --workdir {workdir}: {error.strerror or error}") from error
    save_or_compare(config, workdir)
    return workdir


class Window:
    """Metrics of the steps since the last row, left on the device until the row is written."""

    def __init__(self):
        self._metrics: list[Any] = []
        self._timed_from, self._start = 0, time.monotonic()
        self._compiled = False

    def add(self, metrics: Any) -> None:
        """One step's metrics, as the parallel step returns them."""
        self._metrics.append(metrics)
        if not self._compiled:  # the first step compiles: not counted as speed
            jax.block_until_ready(metrics)
            self._compiled = True
            self.restart()

    def restart(self) -> None:
        """Time only steps after this moment: an evaluation or a checkpoint has come between."""
        self._timed_from, self._start = len(self._metrics), time.monotonic()

    def close(self, batch_size: int) -> dict[str, float]:
        """Means over the window, and images/s; empties it."""
        fetched = jax.device_get([jax.tree.map(lambda m: m.addressable_data(0), m) for m in self._metrics])
        elapsed, timed = time.monotonic() - self._start, len(fetched) - self._timed_from
        row = {name: float(np.mean([m[name] for m in fetched])) for name in ("loss", "top1")}
        row["learning_rate"] = float(np.reshape(fetched[-1]["learning_rate"], -1)[0])
        row["images_per_second"] = timed * batch_size / elapsed
        self._metrics = []
        self.restart()
        return row


def stop_unless_finite(row: dict[str, Any]) -> None:
    """Stop a run that has diverged, before it overwrites its good checkpoints."""
    if not np.isfinite(row["loss"]):
        raise RepVGGError(
            f"the loss is {row['loss']} at step {row['step']} (learning rate {row['learning_rate']:.4g}); "
            "the last checkpoint is kept; try a lower --learning-rate or more --warmup-epochs"
        )


def record_evaluation(
    result: Evaluation, form: str, step: int, epoch: float, log: MetricsLog, progress: RunProgress
) -> None:
    """One evaluation row in the log, one line on the screen."""
    row = {"step": step, "epoch": epoch, "form": form}
    row |= {name: getattr(result, name) for name in ("top1", "top5", "loss", "images")}
    log.write(row, f"test_{form}")
    progress.note(
        f"epoch {epoch:g}: {form} form, top-1 {100 * result.top1:.2f} %, top-5 {100 * result.top5:.2f} %, "
        f"loss {result.loss:.4f}, {result.images} test images"
    )


def opening_line(config: Config, dataset: data.DataSet, start_step: int, total_steps: int) -> str:
    """What is about to run, in one line."""
    devices = jax.devices()
    begin = f"resuming at step {start_step}" if start_step else f"{total_steps} steps"
    return (
        f"{config.model.model} on {config.input.data}: {len(dataset.train)} training and {len(dataset.test)} test "
        f"images, {dataset.num_classes} classes; {len(devices)} {devices[0].device_kind} device(s); {begin}; "
        f"{config.run.workdir}"
    )


def main() -> None:
    """The command; its last line on stdout is one JSON object."""
    result = train(parse())
    print(json.dumps({"train_top1": result.train.top1, "deploy_top1": result.deploy.top1}))


if __name__ == "__main__":
    run_command(main)
