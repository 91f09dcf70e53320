"""Training: `python -m train.main --preset NAME [options]`. The same command again resumes.

config -> data set -> batches [devices, per_device, H, W, C] -> train_step -> TrainState -> checkpoints -> weight files.
"""

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.errors import RepVGGError, WeightsError
from repvgg_jax.quantization.qat import QATRepVGG, quantization_aware, quantized_net, with_ranges, without_ranges
from repvgg_jax.variants import get_variant
from repvgg_jax.weights import WeightsWarning, save_weights

from . import cluster, data
from .checkpoint import Checkpoints
from .class_names import fit_classifier
from .config import Config, parse, save_or_compare
from .data.augmentation import make_transform
from .data.prefetch import Prefetch
from .evaluate import Evaluation, Evaluator, skipped_line
from .loop import FORM_NAMES, Run, Watchers, forms, record_evaluation, run_steps
from .metrics import MetricsLog
from .optimizer import learning_rate_schedule, make_optimizer
from .parallel import per_device_batch, put_batch, replicate, sum_over_processes, to_host
from .plot import plot_curves
from .progress import RunProgress
from .state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: its evaluations by form, and where its weights are."""

    evaluations: dict[str, Evaluation]
    weights: dict[str, Path]


def train(config: Config) -> Result | None:
    """Train from start, or from the newest checkpoint in the run's workdir, to the end.

    Returns:
      The result, or None if SIGTERM stopped the run; its state is saved then.

    Raises:
      RepVGGError: bad options, unreadable data, a workdir that cannot be used, or a loss that is not finite.
    """
    cluster.start(config.cluster)
    run = set_up(config)
    with (
        RunProgress(run.total_steps, run.steps_per_epoch, shown=cluster.is_leader()) as progress,
        Checkpoints(run.workdir, config.run.keep_checkpoints, progress.note) as checkpoints,
    ):
        state = checkpoints.restore(fresh_state(run), run.facts)
        start_step = int(to_host(state.step))
        progress.start(start_step)
        for line in (*run.dataset.notes, opening_line(run, start_step)):
            progress.note(line)

        finished = start_step == run.total_steps
        log = MetricsLog(run.workdir, start_step, finished=finished) if cluster.is_leader() else MetricsLog.silent()
        watchers = Watchers(make_evaluator(run, run.model), log, progress, checkpoints)
        with (
            training_batches(run, start_step) as batches,
            Prefetch(batches, put_batch, config.input.prefetch) as on_device,
            cluster.Preemption() as preemption,
        ):
            state, reached = run_steps(run, state, start_step, on_device, watchers, preemption)
        checkpoints.wait()
        if reached < run.total_steps:
            progress.note(
                f"SIGTERM: stopped after step {reached}, state saved; the same command again goes on from there"
            )
            log.close()
            return None
        result = finish(run, state, watchers)
        log.close()
        skipped = batches.skipped + result.evaluations["train"].skipped
        if skipped:
            progress.note(skipped_line(skipped))
        if cluster.is_leader():
            progress.note(f"curves: {plot_curves([run.workdir], run.workdir / 'curves.png')}")
    cluster.barrier("finished")
    return result


def set_up(config: Config) -> Run:
    """Open the data, name the schedule and the model, make the workdir.

    Raises:
      RepVGGError: as `train`.
    """
    options = config.optimizer
    per_device_batch(options.batch_size, options.accumulate)
    dataset = data.load(
        config.input.data,
        image_size=config.input.test_image_size,
        data_dir=config.input.data_dir,
        crop_fraction=config.input.crop_fraction,
        variant=get_variant(config.model.model),
    )
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), options.batch_size)
    workdir = make_workdir(config)
    model = rv.create_model(
        config.model.model,
        dataset.num_classes,
        dtype=np.dtype(config.model.dtype),
        remat=config.model.remat,
        block=config.model.block,
        branches=config.model.branches,
        activation=config.model.activation,
        stem_stride=config.model.stem_stride,
        dropout=config.model.dropout,
        frozen_stages=config.fine_tune.freeze_stages,
        frozen_bn=config.fine_tune.freeze_bn,
    )
    if config.model.quantization == "qat":
        model = quantization_aware(model)
    schedule = learning_rate_schedule(options, steps_per_epoch)
    optimizer = make_optimizer(options, schedule, config.fine_tune)
    return Run(config, dataset, model, optimizer, schedule, workdir, steps_per_epoch)


def make_workdir(config: Config) -> Path:
    """Create the run's folder, with its config.json.

    Raises:
      RepVGGError: it cannot be created or written to.
      ConfigError: it holds a run with other options.
    """
    workdir = Path(config.run.workdir)
    if cluster.is_leader():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RepVGGError(f"cannot create --workdir {workdir}: {error.strerror or error}") from error
        save_or_compare(config, workdir)
    cluster.barrier("workdir")
    return workdir


def fresh_state(run: Run) -> TrainState:
    """The state at step 0: random weights, or those of `--init`.

    Raises:
      RepVGGError: the file cannot be read, is in deploy form, or holds another network.
    """
    config = run.config
    size, channels = config.input.image_size, run.dataset.preprocessing.channels
    variables, path = None, config.fine_tune.init
    if path is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", WeightsWarning)
            model, variables = rv.load_weights(path, run.model.variant, run.dataset.num_classes)
            info, keep = rv.inspect_weights(path, run.model.variant), config.fine_tune.keep_classifier
            variables = fit_classifier(variables, info, run.dataset, path, keep=keep)
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        if model.deploy:
            raise WeightsError(f"--init {path} is in deploy form, which cannot be trained; give the training form")
        if isinstance(run.model, QATRepVGG):
            variables = with_ranges(variables)
    ema = bool(config.optimizer.ema_decay)
    shape = (size, size, channels)
    return create_state(run.model, run.optimizer, config.run.seed, shape, ema=ema, variables=variables)


def training_batches(run: Run, start_step: int) -> data.Batches:
    """The run's batches from `start_step` on, this process's share of them."""
    config, dataset = run.config, run.dataset
    return data.train_batches(
        dataset.train,
        batch_size=config.optimizer.batch_size,
        local_device_count=jax.local_device_count(),
        transform=make_transform(dataset.train_transform, config.augment, dataset.preprocessing.mean),
        preprocessing=dataclasses.replace(dataset.preprocessing, image_size=config.input.image_size),
        seed=config.run.seed,
        start_step=start_step,
        num_workers=config.input.workers,
        strict=config.input.strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_evaluator(run: Run, model: rv.RepVGG | rv.QuantizedNet) -> Evaluator:
    """Evaluation of `model` on the data set's evaluation split."""
    config, dataset = run.config, run.dataset
    return Evaluator(
        model,
        dataset.test,
        dataset.preprocessing,
        batch_size=config.optimizer.batch_size,
        workers=config.input.workers,
        strict=config.input.strict,
        bad_images=dataset.bad_test_images,
    )


def finish(run: Run, state: TrainState, watchers: Watchers) -> Result:
    """Write the weights in both forms, and evaluate both."""
    epoch, evaluations, paths = float(run.config.optimizer.epochs), {}, {}
    names = {"train": ("final", "deploy"), "ema": ("ema", "ema_deploy")}
    described: dict[str, Any] = dict(
        preprocessing=run.dataset.preprocessing, class_names=tuple(run.dataset.class_names)
    )
    model = rv.create_model(run.model.variant, run.model.num_classes, dtype=run.model.dtype)
    for form, replicated in forms(state).items():
        variables = without_ranges(to_host(replicated))
        deploy_model, deploy_variables = rv.to_deploy(model, variables)
        trained_name, deploy_name = names[form]
        paths |= {name: run.workdir / f"{name}.safetensors" for name in names[form]}
        if cluster.is_leader():
            save_weights(paths[trained_name], model, variables, num_batches_tracked=run.total_steps, **described)
            save_weights(paths[deploy_name], deploy_model, deploy_variables, **described)
        trained = watchers.evaluator(replicated)
        fused = make_evaluator(run, deploy_model)(replicate(deploy_variables))
        deploy_form = "deploy" if form == "train" else "ema_deploy"
        evaluations |= {form: trained, deploy_form: fused}
        for name in (form, deploy_form):
            record_evaluation(evaluations[name], name, run.total_steps, epoch, watchers)
        same = sum_over_processes(int((trained.predictions == fused.predictions).sum()))
        watchers.progress.note(
            f"{FORM_NAMES[form]} and {FORM_NAMES[deploy_form]} agree on {same} of {trained.images} test images"
        )
        watchers.progress.note(f"weights: {paths[trained_name]} (training form), {paths[deploy_name]} (deploy form)")
    if isinstance(run.model, QATRepVGG):
        net = quantized_net(run.model, to_host(forms(state)["train"]), **described)
        paths["int8"] = run.workdir / "int8.safetensors"
        if cluster.is_leader():
            rv.save_quantized(paths["int8"], net)
        evaluations["int8"] = make_evaluator(run, net)(replicate(net.variables))
        record_evaluation(evaluations["int8"], "int8", run.total_steps, epoch, watchers)
        watchers.progress.note(f"weights: {paths['int8']} (INT8)")
    return Result(evaluations, paths)


def opening_line(run: Run, start_step: int) -> str:
    """What is about to run, in one line."""
    devices, processes = jax.devices(), jax.process_count()
    begin = f"resuming at step {start_step}" if start_step else f"{run.total_steps} steps"
    machines = f" in {processes} processes" if processes > 1 else ""
    return (
        f"{run.config.model.model} on {run.config.input.data}: {len(run.dataset.train)} training and "
        f"{len(run.dataset.test)} test images, {run.dataset.num_classes} classes; "
        f"{len(devices)} {devices[0].device_kind} device(s){machines}; {begin}; {run.workdir}"
    )


def main() -> None:
    """The command; its last line on stdout is one JSON object."""
    config = parse()
    try:
        result = train(config)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:  # a collective failed: nobody is left to agree with on an orderly end
            cluster.abandon(error)
        raise
    except RepVGGError as error:
        if jax.process_count() > 1:  # the others wait for this one in a collective: do not wait for them
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        raise
    if result is None:
        sys.exit(cluster.PREEMPTED)
    if cluster.is_leader():
        print(json.dumps({f"{form}_top1": found.top1 for form, found in result.evaluations.items()}))


if __name__ == "__main__":
    run_command(main)
