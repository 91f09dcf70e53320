"""The parts of a run: data set, model, optimizer and schedule, initial state, batches, evaluation.

`main.py` puts them together, `loop.py` takes the steps, and `end.py` writes the weights in the forms of `FORMS`.
"""

import dataclasses
import functools
import sys
import warnings
from typing import Any

import jax
import numpy as np
import optax

import repvgg_jax as rv
from repvgg_jax.errors import ConfigError, WeightsError
from repvgg_jax.net.variants import Variant
from repvgg_jax.paths import Place, option_place
from repvgg_jax.quantization.qat import quantization_aware, with_ranges
from repvgg_jax.weights import WeightsWarning
from repvgg_jax.weights.argument import weights_path
from repvgg_jax.weights.header import TRAINING, Header
from repvgg_jax.weights.loading import load_with_info

from . import data
from .checkpoint import RunFacts
from .class_names import fit_classifier
from .data.augmentation import Augmentation
from .data.fingerprint import data_fingerprint, fingerprint
from .data.transforms import OPTIONS, Transform
from .evaluate import Evaluator
from .optimizer import frozen_blocks, learning_rate_schedule, make_optimizer
from .options import option_name
from .parallel import mean_over_devices, per_device_batch
from .recipe import FineTuneOptions, Recipe
from .state import TrainState, create_state
from .whitening import whitening_of


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of a run's weights that is evaluated and, at the end, written.

    Attributes:
      name: name in metrics.jsonl, and in the deprecated result `NAME_top1`.
      file: name of the weight file, without its suffix.
      title: name in the messages of the run.
      kind: kind of the weight file, for its line at the end.
      result: name in the result `test_top1_NAME`.
    """

    name: str
    file: str
    title: str
    kind: str
    result: str


FORMS = {
    form.name: form
    for form in (
        Form("train", "final", "training form", "training form", "train_form"),
        Form("deploy", "deploy", "deploy form", "deploy form", "deploy_form"),
        Form("ema", "ema", "moving average", "training form", "ema_train_form"),
        Form("ema_deploy", "ema_deploy", "deploy form of the average", "deploy form", "ema_deploy_form"),
        Form("int8", "int8", "INT8 form", "INT8", "int8"),
    )
}
DEPLOY_OF = {"train": "deploy", "ema": "ema_deploy"}
"""The trained forms, each with its fused form."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change between its first step and its last.

    Attributes:
      recipe: options of the run.
      dataset: data set to train and evaluate on.
      model: training form.
      optimizer: optimizer of the train step.
      schedule: learning rate by step.
      transform: augmentation of the training images.
      workdir: folder of the run, local or in a bucket.
      steps_per_epoch: steps per epoch of the training split, at the recipe's batch size.
      start: initial variables; None for random ones.
    """

    recipe: Recipe
    dataset: data.DataSet
    model: rv.RepVGG
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    transform: Transform
    workdir: Place
    steps_per_epoch: int
    start: dict[str, Any] | None

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.recipe.optimizer.epochs * self.steps_per_epoch

    @functools.cached_property
    def facts(self) -> RunFacts:
        """Facts that a checkpoint must agree with."""
        train = self.dataset.train
        names = tuple(self.dataset.class_names)
        net = Header(TRAINING, self.model.variant, self.model.num_classes, self.dataset.preprocessing, names)
        return RunFacts(
            seed=self.recipe.run.seed,
            batch_size=self.recipe.optimizer.batch_size,
            train_images=len(train),
            devices=jax.device_count(),
            classes=fingerprint(*train.class_names),
            images=data_fingerprint(train),
            net=net.to_json(),
        )


def set_up(recipe: Recipe) -> Run:
    """Open the data and the initial weights, and build model, optimizer and schedule; nothing is written.

    Raises:
      RepVGGError: options are incompatible, the data cannot be read, or the weights do not fit.
    """
    per_device_batch(recipe.optimizer.batch_size, recipe.optimizer.accumulate)
    return make_run(recipe, open_data(recipe))


def make_run(recipe: Recipe, dataset: data.DataSet) -> Run:
    """Build the model with its initial weights, the optimizer and the schedule.

    Raises:
      RepVGGError: options are incompatible, there are too few images, or the weights do not fit.
    """
    options, tuning = recipe.optimizer, recipe.fine_tune
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), options.batch_size)
    check_augmentation(recipe.augment, dataset)
    transform = data.make_transform(dataset.train_transform, recipe.augment, dataset.preprocessing.mean)
    variant, start = recipe.model.variant, None
    if tuning.init is not None:
        variant, start = starting_weights(tuning, variant, recipe.model.epsilon, dataset)
    model = rv.create_model(
        variant,
        dataset.num_classes,
        dtype=np.dtype(recipe.model.dtype),
        remat=recipe.model.remat,
        dropout=recipe.model.dropout,
        frozen_stages=tuning.frozen_stages,
        frozen_bn=tuning.freeze_bn,
    )
    if recipe.model.quantization == "qat":
        model = quantization_aware(model)
        start = None if start is None else with_ranges(start)
    schedule = learning_rate_schedule(options, steps_per_epoch)
    frozen = frozen_blocks(variant, tuning.frozen_stages)
    return Run(
        recipe=recipe,
        dataset=dataset,
        model=model,
        optimizer=make_optimizer(options, schedule, head_learning_rate=tuning.head_learning_rate, frozen=frozen),
        schedule=schedule,
        transform=transform,
        workdir=option_place("--workdir", recipe.run.workdir),
        steps_per_epoch=steps_per_epoch,
        start=start,
    )


def open_data(recipe: Recipe, *, unopened: bool = False) -> data.DataSet:
    """Open the recipe's data set; the recipe's options override the data set's row.

    With `unopened`, data whose counts are known are not opened (see `data.open_dataset`).

    Raises:
      DataError: the data set does not exist or cannot be read.
    """
    options = recipe.input
    return data.open_dataset(
        options.data,
        variant=recipe.model.variant,
        image_size=options.test_image_size,
        train_size=options.image_size,
        crop_fraction=options.crop_fraction,
        mean=options.mean,
        std=options.std,
        train_transform=options.train_transform,
        data_dir=options.data_dir,
        train_split=options.train_split,
        test_split=options.test_split,
        unopened=unopened,
    )


def check_augmentation(augmentation: Augmentation, dataset: data.DataSet) -> None:
    """Refuse options that the data set's transform would ignore.

    Raises:
      ConfigError: an option of crop or flip is set, and the transform has none.
    """
    default = Augmentation()
    for name in ("crop_area", "horizontal_flip"):
        is_default = getattr(augmentation, name) == getattr(default, name)
        if not is_default and name not in OPTIONS.get(dataset.train_transform, ()):
            problem = f"is for photographs, and the data set {dataset.name} has none"
            if dataset.train_transform not in ("random_affine", "as_is"):
                problem = f"changes nothing with --train-transform {dataset.train_transform}"
            raise ConfigError(f"{option_name(name)} {problem}: leave it out")


def starting_weights(
    options: FineTuneOptions, variant: Variant, epsilon: float | None, dataset: data.DataSet
) -> tuple[Variant, dict[str, Any]]:
    """Load `--init`: the architecture with BatchNorm's epsilon, and the variables to train.

    Args:
      options: options with the file, and whether to keep its classifier.
      variant: architecture that the file must hold.
      epsilon: BatchNorm's epsilon; None takes the file's.
      dataset: data set whose classes the classifier must have.

    Raises:
      RepVGGError: the file cannot be read, is in deploy form, or holds another network.
    """
    path = weights_path("--init", str(options.init))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        model, variables, info = load_with_info(path, variant, dataset.num_classes, epsilon=epsilon)
        variables = fit_classifier(variables, info, dataset, path, keep=options.keep_classifier)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if model.deploy:
        raise WeightsError(f"--init {path} is in deploy form, which cannot be trained; give the training form")
    return model.variant, variables


def fresh_state(run: Run) -> TrainState:
    """Return the state at step 0, with the weights of `--init` or random ones."""
    size, channels = run.dataset.train_size, run.dataset.preprocessing.channels
    return create_state(
        run.model,
        run.optimizer,
        run.recipe.run.seed,
        (size, size, channels),
        ema=bool(run.recipe.optimizer.ema_decay),
        variables=run.start,
    )


def whitened(run: Run, state: TrainState) -> TrainState:
    """Return a fresh state with the stage that `--whiten-stem` computes from the training images, if it is set.

    Raises:
      ConfigError, DataError: from `whitening_of`.
    """
    if not run.recipe.fine_tune.whiten_stem or run.start is not None:
        return state
    preprocessing = dataclasses.replace(run.dataset.preprocessing, image_size=run.dataset.train_size)
    return whitening_of(run.dataset.train, preprocessing, run.model.variant.widths[0]).put_into(state)


def training_batches(run: Run, start_step: int) -> data.Batches:
    """Return this process's share of the run's batches from `start_step` on."""
    recipe, dataset = run.recipe, run.dataset
    return data.train_batches(
        dataset.train,
        batch_size=recipe.optimizer.batch_size,
        local_device_count=jax.local_device_count(),
        transform=run.transform,
        preprocessing=dataclasses.replace(dataset.preprocessing, image_size=dataset.train_size),
        seed=recipe.run.seed,
        start_step=start_step,
        num_workers=recipe.input.workers,
        processes=recipe.input.worker_processes,
        strict=recipe.input.strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def batch_shapes(run: Run, per_device: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of one device's share of a batch, as the train step takes it."""
    size, channels = run.dataset.train_size, run.dataset.preprocessing.channels
    return {
        "image": jax.ShapeDtypeStruct((per_device, size, size, channels), np.uint8),
        "label": jax.ShapeDtypeStruct((per_device,), np.int32),
    }


def make_evaluator(run: Run, model: rv.RepVGG | rv.QuantizedNet) -> Evaluator:
    """Return an evaluator of `model` on the evaluation split, with batches that take no more memory than training."""
    recipe, dataset = run.recipe, run.dataset
    return Evaluator(
        model,
        dataset.test,
        dataset.preprocessing,
        batch_size=recipe.optimizer.batch_size // recipe.optimizer.accumulate,
        workers=recipe.input.workers,
        strict=recipe.input.strict,
        bad_images=dataset.bad_test_images,
    )


def trained_forms(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return the weights to evaluate by form: the trained ones and, if there is one, their moving average.

    BN statistics are averaged over all devices, for evaluation and saving.
    """
    variables = {"train": state.variables}
    if state.ema_params is not None:
        variables["ema"] = state.ema_variables
    return {form: tree | {"batch_stats": mean_over_devices(tree["batch_stats"])} for form, tree in variables.items()}
