"""Everything that a training run can be asked for, as one frozen tree; `presets.py` has values of it.

An option is one field: its value, its limits, and its help in the string that follows.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

from repvgg_jax.errors import ConfigError
from repvgg_jax.net.branches import MAX_DENSE_COPIES, BlockKind, Branches
from repvgg_jax.net.variants import Published, Variant
from repvgg_jax.paths import local_path, option_place
from repvgg_jax.weights.architecture import find_variant
from repvgg_jax.weights.argument import weights_path

from .data.augmentation import Augmentation
from .data.transforms import TRANSFORMS
from .options import Limit, at_least, at_most, below, between, check_options, must, one_of, option

MAX_CROP_SIZE = 4096
"""Largest side of a run's crops, pixels: one image of A0 takes gigabytes then. Predictions, which need less, have
`MAX_IMAGE_SIZE` of `weights/info.py`."""

_crop_size = (at_least(1), at_most(MAX_CROP_SIZE))
_share = must("be above 0 and at most 1", lambda value: 0 < value <= 1)
_rgb = must(
    "be three finite numbers, one for each colour", lambda value: len(value) == 3 and all(map(math.isfinite, value))
)


def _numbers(count: int) -> Limit:
    return must(f"be {count} numbers", lambda values: len(values) == count)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model: str = "RepVGG-A0"
    """Variant, one of `rv.list_models()`; or a file for the architecture: NET.json with a variant's fields, or any
    weight file."""
    num_blocks: tuple[int, ...] | None = option(None, _numbers(4), between(1, 999))
    """Blocks of stages 1 to 4, such as 2 4 14 1; the model's own if not given."""
    widths: tuple[int, ...] | None = option(None, _numbers(5), between(1, 99999))
    """Output channels of stages 0 to 4, such as 48 48 96 192 1280; the model's own if not given."""
    strides: tuple[int, ...] | None = option(None, _numbers(5), between(1, 2))
    """Strides of stages 0 to 4, such as 1 1 2 2 2 for images as small as 32x32; the model's own if not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype; parameters, BN statistics, logits and loss stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more compute."""
    block: BlockKind | None = None
    """Training form's block: RepVGG's, or QARepVGG's for INT8; the model's own if not given."""
    dense_copies: int = option(1, at_least(1), at_most(MAX_DENSE_COPIES))
    """3x3 branches in each block (MobileOne)."""
    dbb_1x1_3x3: bool = False
    """A branch of 1x1 and 3x3 convolution in each block (Diverse Branch Block)."""
    dbb_1x1_avg: bool = False
    """A branch of 1x1 convolution and average pooling in each block (Diverse Branch Block)."""
    strips: bool = False
    """A branch of 1x3 and one of 3x1 convolution in each block (ACNet)."""
    point: bool = True
    """RepVGG's 1x1 branch."""
    identity: bool = True
    """RepVGG's identity branch."""
    activation: Literal["relu", "relu6", "leaky_relu", "gelu", "silu"] | None = None
    """What follows each block's sum; the model's own if not given."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of stage 0 alone, whatever --strides says."""
    epsilon: float | None = option(None, must("be above 0 and below 1", lambda value: 0 < value < 1))
    """What BatchNorm adds to the variance; that of a native --init file if not given, else the model's own, 1e-5."""
    dropout: float = option(0.0, at_least(0), below(1))
    """Share of the pooled features dropped before the classifier."""
    quantization: Literal["none", "qat"] = "none"
    """qat: train the deployed INT8 net itself, starting from the finished training of --init."""

    @property
    def branches(self) -> Branches:
        """What the options make of RepVGG's own branches."""
        return Branches(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Branches)})

    @functools.cached_property
    def variant(self) -> Variant:
        """The architecture: that of `model`, with what the other options change of it.

        Raises:
          RepVGGError: there is no such model, its file cannot be read, or the numbers make no network.
        """
        named = find_variant("--model", self.model)
        changes: dict[str, Any] = {
            name: value
            for name in ("num_blocks", "widths", "strides", "block", "activation", "epsilon")
            if (value := getattr(self, name)) is not None
        }
        if self.stem_stride is not None:
            changes["strides"] = (self.stem_stride, *changes.get("strides", named.strides)[1:])
        if self.num_blocks or self.widths:
            changes["name"] = "custom"
        added = {name: value for name, value in vars(self.branches).items() if value != getattr(Branches, name)}
        if added:
            changes["branches"] = dataclasses.replace(named.branches, **added)
        if changes:
            changes["published"] = Published()
        try:
            return dataclasses.replace(named, **changes)
        except ValueError as error:
            raise ConfigError(f"--model {self.model} cannot be changed like this: {error}") from error


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """What it is trained on. What the data set's row in `data/datasets.py` says is its own, unless it is given here."""

    data: str = option("digits", local_path)
    """A TFDS name, a folder with train/CLASS/* and val/CLASS/*, `digits`, or `synthetic`."""
    data_dir: str | None = option(None, option_place)
    """Where TFDS keeps its data sets; TFDS_DATA_DIR or ~/tensorflow_datasets if not given."""
    train_split: str | None = None
    """Training split of a TFDS data set, or a slice of one, such as train[:90%]; `train` if not given."""
    test_split: str | None = None
    """Evaluation split, such as train[90%:]; `validation`, or else `test`, if not given."""
    image_size: int | None = option(None, *_crop_size)
    """Side of the training crops, pixels, whatever the variant: the data set's own if not given, 224 for photographs.
    The authors too train RepVGG-D2se at 224 and evaluate it at 320."""
    test_image_size: int | None = option(None, *_crop_size)
    """Side of the evaluation crops, pixels; the data set's own, or else the variant's published one, if not given."""
    crop_fraction: float | None = option(None, _share)
    """Share of the resized shorter side that an evaluation crop keeps; if not given, the data set's own (1 for digits
    and synthetic images), or else the variant's published one."""
    mean: tuple[float, ...] | None = option(None, _rgb)
    """Mean of each colour, for pixel values in 0..1; the data set's own if not given, ImageNet's for photographs."""
    std: tuple[float, ...] | None = option(None, _rgb, must("be positive", lambda value: min(value) > 0))
    """Standard deviation of each colour."""
    train_transform: str | None = option(None, one_of(TRANSFORMS))
    """What brings a training image to its size: random_resized_crop_flip, pad_and_crop_flip, random_affine or as_is;
    the data set's own if not given."""
    workers: int | None = option(None, at_least(1))
    """Images decoded at a time, by a thread each; one for each core if not given. Results do not depend on it."""
    worker_processes: int | None = option(None, at_least(1))
    """Processes that have these threads; 1: the run's own; if not given, one for every 8 workers, from 16 workers on.
    Evaluation is left to threads. Results do not depend on it."""
    strict: bool = False
    """Stop at an unreadable image instead of skipping and counting it."""
    prefetch: int = option(2, at_least(1))
    """Batches copied to the devices ahead of the step that needs them."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How it is trained: SGD on a cosine schedule, per step."""

    epochs: int = option(120, at_least(1))
    """Passes over the training split."""
    batch_size: int = option(256, at_least(1))
    """Global batch, over all devices of all processes."""
    accumulate: int = option(1, at_least(1))
    """Portions that each device walks its share of the batch in, to save memory; gradients are averaged over them."""
    learning_rate: float = option(0.1, at_least(0))
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    momentum: float = option(0.9, at_least(0), below(1))
    nesterov: bool = False
    weight_decay: float = option(1e-4, at_least(0))
    """On convolution and linear kernels and on rbr_identity's BN weight, nothing else."""
    warmup_epochs: float = option(0.0, at_least(0))
    """Epochs of linear warm-up from 0 before the cosine."""
    label_smoothing: float = option(0.0, at_least(0), below(1))
    mixup: float = option(0.0, at_least(0))
    """Mixup's alpha; 0 is off. With CutMix on too, each is drawn half the time."""
    cutmix: float = option(0.0, at_least(0))
    """CutMix's alpha; 0 is off."""
    auxiliary_weight: float = option(0.1, at_least(0))
    """Weight of each auxiliary head's loss (RepVGGplus)."""
    clip_norm: float = option(0.0, at_least(0))
    """Largest global norm of the gradient; 0 does not clip."""
    ema_decay: float = option(0.0, at_least(0), below(1))
    """Decay of the moving average of weights and BN statistics, such as 0.9999; 0 keeps none."""


@dataclasses.dataclass(frozen=True)
class FineTuneOptions:
    """Where it starts, and what of it trains."""

    init: str | None = option(None, weights_path)
    """Weights to start from: a file in training form, anything that `rv.load_weights` reads, or the name of a variant,
    for its ImageNet weights; classes other than the data's, in number or by name, give a fresh classifier."""
    keep_classifier: bool = False
    """Keep the classifier of --init though the file names other classes than the data, as many of them."""
    freeze_stages: int = option(0, at_least(0), at_most(5))
    """How many of the five stages, from the first, keep their weights and BN statistics."""
    whiten_stem: bool = False
    """Compute stage 0 from the training images instead of training it, so that it whitens them: its filters are the
    principal components of their 3x3 patches. Short trainings reach more. Of --init it is kept as it is there."""
    freeze_bn: bool = False
    """Use the running BN statistics and leave them alone."""
    head_learning_rate: float = option(1.0, at_least(0))
    """Factor on the classifier's learning rate."""

    @property
    def frozen_stages(self) -> int:
        """How many stages are not trained."""
        return max(self.freeze_stages, int(self.whiten_stem))


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Which of several processes this is; found in the cluster's environment if none is given."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where it goes and how often it is looked at."""

    workdir: str = option("", option_place)
    """Folder of the run; runs/PRESET-MODEL if not given (runs/cifar10 for that preset's own net). The same command
    again resumes it."""
    seed: int = option(0, at_least(0), below(2**63))
    log_every: int = option(50, at_least(1))
    """Steps between rows of metrics.jsonl."""
    evaluate_every: int = option(1, at_least(1))
    """Epochs between evaluations."""
    checkpoint_every: int = option(1000, at_least(1))
    """Steps between checkpoints; one more is written at every evaluation."""
    keep_checkpoints: int = option(2, at_least(1))
    """Newest checkpoints to keep; the best one is kept besides."""
    profile: bool = False
    """Write a JAX trace of a few steps into the run's folder, for TensorBoard's profiler or Perfetto."""
    tracker: Literal["none", "wandb"] = "none"
    """Who gets the rows of metrics.jsonl besides TensorBoard: wandb, Weights & Biases; the environment says where
    (WANDB_MODE, WANDB_PROJECT, WANDB_NAME)."""
    preflight: str | None = None
    """Instead of training, compile this run for machines that are not here, and say whether it fits them: a TPU slice,
    such as v5e:16x16, or so many GPUs, such as h100:8. Needs no data and writes nothing."""
    preflight_largest: bool = False
    """With --preflight: also find the largest batch that fits, which takes a few more compilations."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run."""

    model: ModelOptions = ModelOptions()
    input: InputOptions = InputOptions()
    augment: Augmentation = Augmentation()
    optimizer: OptimizerOptions = OptimizerOptions()
    fine_tune: FineTuneOptions = FineTuneOptions()
    run: RunOptions = RunOptions()
    cluster: ClusterOptions = ClusterOptions()


def check_recipe(recipe: Recipe) -> None:
    """Refuse what no run can use: options beyond their limits, and those that do not go together.

    Raises:
      ConfigError: names the option, its value and what it must be.
      UnknownModelError: no such variant.
    """
    for group in dataclasses.fields(recipe):
        check_options(getattr(recipe, group.name))
    _ = recipe.model.variant
    if recipe.model.quantization == "qat" and recipe.fine_tune.init is None:
        raise ConfigError("--quantization qat fine-tunes a trained net: give its training form with --init")
    if recipe.run.preflight_largest and recipe.run.preflight is None:
        raise ConfigError("--preflight-largest needs --preflight TARGET")
    warmup, epochs = recipe.optimizer.warmup_epochs, recipe.optimizer.epochs
    if warmup >= epochs:
        raise ConfigError(f"--warmup-epochs {warmup:g} leaves nothing of {epochs} --epochs")
