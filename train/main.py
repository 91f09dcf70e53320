"""Training: `python -m train.main --preset NAME [options]`. The same command again resumes.

config -> data set -> batches [devices, per_device, H, W, C] -> train_step -> TrainState -> checkpoints -> weight files.
"""

if __name__ == "__main__":  # before the imports that take long: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("train.main")

import dataclasses
import json
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

import repvgg_jax as rv
from repvgg_jax.errors import ConfigError, RepVGGError, WeightsError
from repvgg_jax.net.variants import get_variant
from repvgg_jax.paths import local_path
from repvgg_jax.quantization.qat import QATRepVGG, quantization_aware, quantized_net, with_ranges, without_ranges
from repvgg_jax.weights import WeightsWarning, save_weights
from repvgg_jax.weights.hub import weights_path

from . import cluster, data
from .checkpoint import Checkpoints
from .class_names import fit_classifier
from .config import Config, parse
from .data.augmentation import Augmentation, make_transform
from .data.prefetch import Prefetch
from .evaluate import Evaluation, Evaluator, skipped_line
from .loop import FORM_NAMES, Run, Watchers, forms, record_evaluation, run_steps
from .metrics import MetricsLog
from .optimizer import learning_rate_schedule, make_optimizer
from .parallel import per_device_batch, put_batch, replicate, sum_over_processes, to_host
from .plot import plot_curves
from .progress import RunProgress
from .state import TrainState, create_state
from .workdir import claimed


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: its evaluations by form, and where its weights are."""

    evaluations: dict[str, Evaluation]
    weights: dict[str, Path]


def train(config: Config) -> Result | None:
    """Train from start, or from the newest checkpoint in the run's workdir, to the end.

    Returns:
      The result, or None if a signal stopped the run (`cluster.Preemption`); its state is saved then.

    Raises:
      RepVGGError: bad options, unreadable data, a workdir that cannot be used, or a loss that is not finite.
    """
    cluster.start(config.cluster)
    run = set_up(config)
    weights = starting_weights(run)
    with (
        claimed(config, run.workdir),
        RunProgress(run.total_steps, run.steps_per_epoch, shown=cluster.is_leader()) as progress,
        Checkpoints(run.workdir, config.run.keep_checkpoints, progress.note) as checkpoints,
    ):
        state = checkpoints.restore(fresh_state(run, weights), run.facts)
        start_step = int(to_host(state.step))
        progress.start(start_step)
        for line in (*run.dataset.notes, opening_line(run, start_step)):
            progress.note(line)

        finished = start_step == run.total_steps
        log = MetricsLog.silent()
        if cluster.is_leader():
            log = MetricsLog(run.workdir, start_step, finished=finished, note=progress.note)
        watchers = Watchers(make_evaluator(run, run.model), log, progress, checkpoints)
        with (
            training_batches(run, start_step) as batches,
            Prefetch(batches, put_batch, config.input.prefetch) as on_device,
            cluster.Preemption() as preemption,
        ):
            state, reached = run_steps(run, state, start_step, on_device, watchers, preemption)
            checkpoints.wait()
        if preemption.stopping():
            progress.note(
                f"{cluster.stop_signal().name}: stopped after step {reached}, state saved; "
                "the same command again goes on from there"
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
    """Open the data, name the schedule and the model; nothing is written.

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
        train_split=config.input.train_split,
        test_split=config.input.test_split,
    )
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), options.batch_size)
    check_augmentation(config.augment, dataset)
    transform = make_transform(dataset.train_transform, config.augment, dataset.preprocessing.mean)
    model = rv.create_model(
        config.model.model,
        dataset.num_classes,
        dtype=np.dtype(config.model.dtype),
        remat=config.model.remat,
        block=config.model.block,
        branches=config.model.branches,
        activation=config.model.activation,
        strides=(config.model.stem_stride, 2, 2, 2, 2),
        epsilon=starting_epsilon(config),
        dropout=config.model.dropout,
        frozen_stages=config.fine_tune.freeze_stages,
        frozen_bn=config.fine_tune.freeze_bn,
    )
    if config.model.quantization == "qat":
        model = quantization_aware(model)
    schedule = learning_rate_schedule(options, steps_per_epoch)
    optimizer = make_optimizer(options, schedule, config.fine_tune)
    workdir = local_path("--workdir", config.run.workdir)
    return Run(config, dataset, model, optimizer, schedule, transform, workdir, steps_per_epoch)


def init_path(config: Config) -> str | None:
    """Return where `--init` points, or None without it.

    Raises:
      RepVGGError: it is no path that can be read.
    """
    path = config.fine_tune.init
    return None if path is None else weights_path("--init", path)


def starting_epsilon(config: Config) -> float | None:
    """Return BatchNorm's epsilon: the option's, or that of the weights that training starts from.

    Raises:
      RepVGGError: `--init` cannot be read.
    """
    path = init_path(config)
    if config.model.epsilon is not None or path is None:
        return config.model.epsilon
    return rv.inspect_weights(path, config.model.model).variant.epsilon


def check_augmentation(augmentation: Augmentation, dataset: data.DataSet) -> None:
    """Refuse options that the data set's transform would ignore.

    Raises:
      ConfigError: a crop or flip of photographs, for images that are none.
    """
    if dataset.train_transform == "random_resized_crop_flip":
        return
    default = Augmentation()
    for name in ("crop_area", "horizontal_flip"):
        if getattr(augmentation, name) != getattr(default, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for photographs, and the data set {dataset.name} has none: leave it out")


def starting_weights(run: Run) -> dict[str, Any] | None:
    """Return the weights of `--init`; None without it.

    Raises:
      RepVGGError: the file cannot be read, is in deploy form, or holds another network.
    """
    path = init_path(run.config)
    if path is None:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        variant = run.model.variant
        model, variables = rv.load_weights(path, variant, run.dataset.num_classes, epsilon=variant.epsilon)
        info, keep = rv.inspect_weights(path, run.model.variant), run.config.fine_tune.keep_classifier
        variables = fit_classifier(variables, info, run.dataset, path, keep=keep)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if model.deploy:
        raise WeightsError(f"--init {path} is in deploy form, which cannot be trained; give the training form")
    return with_ranges(variables) if isinstance(run.model, QATRepVGG) else variables


def fresh_state(run: Run, weights: dict[str, Any] | None) -> TrainState:
    """Return the state at step 0: these weights, or random ones."""
    config = run.config
    size, channels = config.input.image_size, run.dataset.preprocessing.channels
    ema = bool(config.optimizer.ema_decay)
    shape = (size, size, channels)
    return create_state(run.model, run.optimizer, config.run.seed, shape, ema=ema, variables=weights)


def training_batches(run: Run, start_step: int) -> data.Batches:
    """The run's batches from `start_step` on, this process's share of them."""
    config, dataset = run.config, run.dataset
    return data.train_batches(
        dataset.train,
        batch_size=config.optimizer.batch_size,
        local_device_count=jax.local_device_count(),
        transform=run.transform,
        preprocessing=dataclasses.replace(dataset.preprocessing, image_size=config.input.image_size),
        seed=config.run.seed,
        start_step=start_step,
        num_workers=config.input.workers,
        strict=config.input.strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_evaluator(run: Run, model: rv.RepVGG | rv.QuantizedNet) -> Evaluator:
    """Evaluation of `model` on the data set's evaluation split, in batches that take no more memory than training."""
    config, dataset = run.config, run.dataset
    return Evaluator(
        model,
        dataset.test,
        dataset.preprocessing,
        batch_size=config.optimizer.batch_size // config.optimizer.accumulate,
        workers=config.input.workers,
        strict=config.input.strict,
        bad_images=dataset.bad_test_images,
    )


def finish(run: Run, state: TrainState, watchers: Watchers) -> Result:
    """Write the weights in both forms, and evaluate both: in float32, as the files hold them."""
    epoch, evaluations, paths = float(run.config.optimizer.epochs), {}, {}
    names = {"train": ("final", "deploy"), "ema": ("ema", "ema_deploy")}
    described: dict[str, Any] = dict(
        preprocessing=run.dataset.preprocessing, class_names=tuple(run.dataset.class_names)
    )
    model = rv.create_model(run.model.variant, run.model.num_classes, dtype=run.model.dtype)
    in_float32 = watchers.evaluator
    if run.model.dtype != np.float32:
        in_float32 = make_evaluator(run, run.model.clone(dtype=np.float32))
    for form, replicated in forms(state).items():
        variables = without_ranges(to_host(replicated))
        deploy_model, deploy_variables = rv.to_deploy(model, variables)
        trained_name, deploy_name = names[form]
        paths |= {name: run.workdir / f"{name}.safetensors" for name in names[form]}
        if cluster.is_leader():
            save_weights(paths[trained_name], model, variables, num_batches_tracked=run.total_steps, **described)
            save_weights(paths[deploy_name], deploy_model, deploy_variables, **described)
        with exact_float32():
            trained = in_float32(replicated)
            fused = make_evaluator(run, deploy_model.clone(dtype=np.float32))(replicate(deploy_variables))
        deploy_form = "deploy" if form == "train" else "ema_deploy"
        evaluations |= {form: trained, deploy_form: fused}
        for name in (form, deploy_form):
            record_evaluation(evaluations[name], name, run.total_steps, epoch, watchers)
        same = sum_over_processes(int((trained.predictions == fused.predictions).sum()))
        watchers.progress.note(
            f"{FORM_NAMES[form]} and {FORM_NAMES[deploy_form]}, both computed in float32, predict the same class for "
            f"{same} of {trained.images} test images"
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


def short(error: Exception) -> str:
    """An error's text on one line of bounded length."""
    return " ".join(str(error).split())[:200]


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


def exact_float32() -> AbstractContextManager[object]:
    """Return a context in which float32 is computed as such: with TF32, a GPU's own choice, the two forms differ."""
    on_cpu = jax.default_backend() == "cpu"
    return nullcontext() if on_cpu else jax.default_matmul_precision("float32")


def summary(result: Result) -> dict[str, float]:
    """Return the test accuracies by what they are of; under the names of version 0.1 too, until the next one."""
    named = {f"test_top1_{RESULT_NAMES[form]}": found.top1 for form, found in result.evaluations.items()}
    return named | {f"{form}_top1": found.top1 for form, found in result.evaluations.items()}


RESULT_NAMES = {
    "train": "train_form",
    "deploy": "deploy_form",
    "ema": "ema_train_form",
    "ema_deploy": "ema_deploy_form",
    "int8": "int8",
}


def main() -> None:
    """The command; its last line on stdout is one JSON object."""
    config = parse()
    try:
        result = train(config)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and jax.process_count() == 1:
            raise RepVGGError(
                f"out of memory ({short(error)}); take a smaller --batch-size, more --accumulate, or --remat"
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
        print(json.dumps(summary(result)))
