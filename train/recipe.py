"""All options of a training run, as one frozen tree of dataclasses; `presets.py` holds instances of it.

An option is one field with its default and limits; the string after it is its help text.
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
"""Largest side of a run's crops, pixels, at which one image of A0 takes gigabytes. Predictions need less memory; their
limit is `MAX_IMAGE_SIZE` of `weights/info.py`."""

_crop_size = (at_least(1), at_most(MAX_CROP_SIZE))
_share = must("be above 0 and at most 1", lambda value: 0 < value <= 1)
_rgb = must(
    "be three finite numbers, one for each colour", lambda value: len(value) == 3 and all(map(math.isfinite, value))
)


def _numbers(count: int) -> Limit:
    return must(f"be {count} numbers", lambda values: len(values) == count)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The network to train. An option with the value None keeps the setting of --model."""

    model: str = "RepVGG-A0"
    """Variant, one of `rv.list_models()`, or a file with the architecture: NET.json or any weight file.
    NET.json holds a variant's fields."""
    num_blocks: tuple[int, ...] | None = option(None, _numbers(4), between(1, 999))
    """Number of blocks in stages 1 to 4, such as 2 4 14 1."""
    widths: tuple[int, ...] | None = option(None, _numbers(5), between(1, 99999))
    """Output channels of stages 0 to 4, such as 48 48 96 192 1280."""
    strides: tuple[int, ...] | None = option(None, _numbers(5), between(1, 2))
    """Strides of stages 0 to 4, such as 1 1 2 2 2 for images as small as 32x32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype; parameters, BN statistics, logits and loss stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass, which saves memory and costs compute."""
    block: BlockKind | None = None
    """Block of the training form: RepVGG's, or QARepVGG's, which suits INT8."""
    dense_copies: int = option(1, at_least(1), at_most(MAX_DENSE_COPIES))
    """Number of 3x3 branches per block (MobileOne)."""
    dbb_1x1_3x3: bool = False
    """Add a branch with a 1x1 and a 3x3 convolution to each block (Diverse Branch Block)."""
    dbb_1x1_avg: bool = False
    """Add a branch with a 1x1 convolution and average pooling to each block (Diverse Branch Block)."""
    strips: bool = False
    """Add a branch with a 1x3 and one with a 3x1 convolution to each block (ACNet)."""
    point: bool = True
    """Keep RepVGG's 1x1 branch."""
    identity: bool = True
    """Keep RepVGG's identity branch."""
    activation: Literal["relu", "relu6", "leaky_relu", "gelu", "silu"] | None = None
    """Activation after each block's sum."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of stage 0; overrides the first value of --strides."""
    epsilon: float | None = option(None, must("be above 0 and below 1", lambda value: 0 < value < 1))
    """Epsilon that BatchNorm adds to the variance; if not set, a native --init file's, or else the model's (1e-5)."""
    dropout: float = option(0.0, at_least(0), below(1))
    """Dropout rate of the pooled features before the classifier."""
    quantization: Literal["none", "qat"] = "none"
    """qat: train the deployed INT8 net itself (quantisation-aware training), starting from the trained --init."""

    @property
    def branches(self) -> Branches:
        """Branches of each block that the options above select."""
        return Branches(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Branches)})

    @functools.cached_property
    def variant(self) -> Variant:
        """Architecture of `model`, with the changes that the other options make.

        Raises:
          RepVGGError: there is no such model, its file cannot be read, or the numbers do not make a network.
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
    """The images to train and evaluate on. None stands for the data set's value, unless the option says otherwise."""

    data: str = option("digits", local_path)
    """Data set: a TFDS name, a folder with train/CLASS/* and val/CLASS/*, `digits`, or `synthetic`."""
    data_dir: str | None = option(None, option_place)
    """Folder of the TFDS data sets; if not set, $TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    train_split: str | None = None
    """Training split of a TFDS data set, or a slice of one, such as train[:90%]; `train` if not set."""
    test_split: str | None = None
    """Evaluation split, such as train[90%:]; if not set, `validation`, or else `test`."""
    image_size: int | None = option(None, *_crop_size)
    """Side of the training crops, pixels, for every variant; 224 for photographs.
    The authors, too, train RepVGG-D2se at 224 and evaluate it at 320."""
    test_image_size: int | None = option(None, *_crop_size)
    """Side of the evaluation crops, pixels; if not set, the data set's, or else the variant's published size."""
    crop_fraction: float | None = option(None, _share)
    """Share of the resized shorter side that an evaluation crop keeps.
    If not set, the data set's (1 for digits and synthetic images), or else the variant's published value."""
    mean: tuple[float, ...] | None = option(None, _rgb)
    """Mean of each colour channel, for pixel values in 0..1; ImageNet's for photographs."""
    std: tuple[float, ...] | None = option(None, _rgb, must("be positive", lambda value: min(value) > 0))
    """Standard deviation of each colour channel, for pixel values in 0..1; ImageNet's for photographs."""
    train_transform: str | None = option(None, one_of(TRANSFORMS))
    """Transform that crops or resizes a training image to the input size.
    One of random_resized_crop_flip, pad_and_crop_flip, random_affine and as_is."""
    workers: int | None = option(None, at_least(1))
    """Number of decoding threads; one per core if not set. Results do not depend on it."""
    worker_processes: int | None = option(None, at_least(1))
    """Processes that share the decoding threads; 1 keeps them in the run's own process.
    If not set, one process per 8 workers if there are at least 16 workers, or else 1.
    Evaluation uses threads only. Results do not depend on this option."""
    strict: bool = False
    """Stop at an unreadable image instead of skipping and counting it."""
    prefetch: int = option(2, at_least(1))
    """Number of batches copied to the devices ahead of the step that needs them."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """SGD with a cosine schedule, updated every step."""

    epochs: int = option(120, at_least(1))
    """Passes over the training split."""
    batch_size: int = option(256, at_least(1))
    """Global batch size, over all devices of all processes."""
    accumulate: int = option(1, at_least(1))
    """Portions into which each device splits its share of the batch to save memory; their gradients are averaged."""
    learning_rate: float = option(0.1, at_least(0))
    """Peak learning rate for a global batch of 256; scaled linearly with the batch size."""
    momentum: float = option(0.9, at_least(0), below(1))
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = option(1e-4, at_least(0))
    """Weight decay of convolution and linear kernels and of rbr_identity's BN weight, but of nothing else."""
    warmup_epochs: float = option(0.0, at_least(0))
    """Epochs of linear warm-up from 0 before the cosine."""
    label_smoothing: float = option(0.0, at_least(0), below(1))
    """Share of the target that is spread evenly over all classes."""
    mixup: float = option(0.0, at_least(0))
    """Mixup's alpha; 0 turns it off. If CutMix is on too, each step draws one of the two with equal probability."""
    cutmix: float = option(0.0, at_least(0))
    """CutMix's alpha; 0 turns it off."""
    auxiliary_weight: float = option(0.1, at_least(0))
    """Weight of each auxiliary head's loss (RepVGGplus)."""
    clip_norm: float = option(0.0, at_least(0))
    """Largest global norm of the gradient, which is scaled down to it; 0 turns clipping off."""
    ema_decay: float = option(0.0, at_least(0), below(1))
    """Decay of the moving average of weights and BN statistics, such as 0.9999; 0 turns the average off."""


@dataclasses.dataclass(frozen=True)
class FineTuneOptions:
    """Initial weights, and which parts of the net are trained."""

    init: str | None = option(None, weights_path)
    """Initial weights: a training-form file that `rv.load_weights` reads, or a variant's name for its ImageNet weights.
    If the number or the names of its classes differ from the data's, the classifier is initialised afresh."""
    keep_classifier: bool = False
    """Keep the classifier of --init when only the names of its classes differ from the data's, not their number."""
    freeze_stages: int = option(0, at_least(0), at_most(5))
    """Freeze the weights and BN statistics of the first N of the five stages."""
    whiten_stem: bool = False
    """Compute stage 0 from the training images instead of training it, so that it whitens them.
    Its filters are the principal components of the images' 3x3 patches. Short training runs gain accuracy.
    With --init, stage 0 is taken from the file and not trained."""
    freeze_bn: bool = False
    """Normalise with the running BN statistics and do not update them."""
    head_learning_rate: float = option(1.0, at_least(0))
    """Factor by which the classifier's learning rate is multiplied."""

    @property
    def frozen_stages(self) -> int:
        """Number of stages, from the first, that are not trained."""
        return max(self.freeze_stages, int(self.whiten_stem))


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Runs with several processes. If none of these is set, they are read from the cluster's environment."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """Number of processes of the run."""
    process_id: int | None = None
    """Index of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Output folder, logging, evaluation and checkpoints."""

    workdir: str = option("", option_place)
    """Output folder; if not set, runs/PRESET-MODEL (runs/cifar10 for that preset's own net).
    Run the same command again to resume the run in this folder."""
    seed: int = option(0, at_least(0), below(2**63))
    """Seed of everything random: initial weights, order of the images, augmentation, mixup, dropout."""
    log_every: int = option(50, at_least(1))
    """Steps between rows of metrics.jsonl; each epoch has a row at least."""
    evaluate_every: int = option(1, at_least(1))
    """Epochs between evaluations."""
    checkpoint_every: int = option(1000, at_least(1))
    """Steps between checkpoints; every evaluation writes one too."""
    keep_checkpoints: int = option(2, at_least(1))
    """Number of newest checkpoints to keep; the best one is always kept."""
    profile: bool = False
    """Write a JAX trace of a few steps into the run's folder, for TensorBoard's profiler or Perfetto."""
    tracker: Literal["none", "wandb"] = "none"
    """Tracker that also gets the rows of metrics.jsonl (TensorBoard always does): wandb is Weights & Biases.
    The environment variables WANDB_MODE, WANDB_PROJECT and WANDB_NAME configure it."""
    preflight: str | None = None
    """Instead of training, compile this run for another machine, and report whether it fits into the memory.
    The machine is a TPU slice, such as v5e:16x16, or a number of GPUs, such as h100:8.
    Needs no data, and writes nothing."""
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
    """Check every option's limits and that the options are compatible.

    Raises:
      ConfigError: an option is invalid; the message names it, its value and the limit.
      UnknownModelError: there is no such variant.
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
