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
    """The network to train. Options that are not set keep the setting of --model."""

    model: str = "RepVGG-A0"
    """Architecture: the name of a variant (`python -m repvgg_jax summary` lists them), a JSON file with the fields of a
    variant, or a weight file, whose weights are not used."""
    num_blocks: tuple[int, ...] | None = option(None, _numbers(4), between(1, 999))
    """Number of blocks in stages 1 to 4, such as 2 4 14 1."""
    widths: tuple[int, ...] | None = option(None, _numbers(5), between(1, 99999))
    """Output channels of stages 0 to 4, such as 48 48 96 192 1280."""
    strides: tuple[int, ...] | None = option(None, _numbers(5), between(1, 2))
    """Strides of stages 0 to 4, such as 1 1 2 2 2 for images as small as 32x32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Parameters, BN statistics, logits and loss stay in float32."""
    remat: bool = False
    """Recompute activations in the backward pass. This needs less memory and takes more time."""
    block: BlockKind | None = None
    """Block of the training form: repvgg, or qarepvgg, which loses less accuracy in INT8."""
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
    """Activation at the end of each block."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of stage 0; overrides the first value of --strides."""
    epsilon: float | None = option(None, must("be above 0 and below 1", lambda value: 0 < value < 1))
    """Epsilon that BatchNorm adds to the variance. Default: the value recorded in the file of --init, or else that of
    --model."""
    dropout: float = option(0.0, at_least(0), below(1))
    """Dropout rate in front of the classifier."""
    quantization: Literal["none", "qat"] = "none"
    """qat: quantisation-aware training of an INT8 net. It starts from the trained weights of --init."""

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
            raise ConfigError(f"--model {self.model} cannot have these options: {error}") from error


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Images to train and evaluate on. Values that neither the preset nor an option sets are those of the data set."""

    data: str = option("digits", local_path)
    """Data set: the name of a TFDS data set, a folder with train/CLASS/* and val/CLASS/*, digits (the scanned digits
    of scikit-learn) or synthetic (random pixels)."""
    data_dir: str | None = option(None, option_place)
    """Folder of the TFDS data sets. Default: $TFDS_DATA_DIR, or ~/tensorflow_datasets if that is not set."""
    train_split: str | None = None
    """Training split of a TFDS data set, or a slice of a split, such as train[:90%]. Default: train."""
    test_split: str | None = None
    """Evaluation split, or a slice of a split, such as train[90%:]. Default: validation, or test if there is none."""
    image_size: int | None = option(None, *_crop_size)
    """Height and width of the training crops in pixels. For photographs, the data set's value is 224."""
    test_image_size: int | None = option(None, *_crop_size)
    """Height and width of the evaluation crops in pixels. For photographs, the data set's value is the variant's
    published size."""
    crop_fraction: float | None = option(None, _share)
    """Size of the evaluation crop as a fraction of the resized shorter side, above 0 and at most 1.
    For photographs, the data set's value is the variant's published one; for digits and synthetic images, it is 1."""
    mean: tuple[float, ...] | None = option(None, _rgb)
    """Mean of each colour channel, for pixel values from 0 to 1. For photographs, the data set's value is that of
    ImageNet."""
    std: tuple[float, ...] | None = option(None, _rgb, must("be positive", lambda value: min(value) > 0))
    """Standard deviation of each colour channel, for pixel values from 0 to 1. For photographs, the data set's value is
    that of ImageNet."""
    train_transform: str | None = option(None, one_of(TRANSFORMS))
    """How a training image is brought to the input size: random_resized_crop_flip, pad_and_crop_flip, random_affine or
    as_is. For photographs, the data set's value is random_resized_crop_flip."""
    workers: int | None = option(None, at_least(1))
    """Number of decoding threads. Default: one per core. It does not affect the results."""
    worker_processes: int | None = option(None, at_least(1))
    """Number of processes that share the decoding threads; 1 keeps the threads in the main process.
    Default: one process per 8 workers if there are at least 16 workers, and 1 otherwise. Evaluation always uses threads
    of the main process. It does not affect the results."""
    strict: bool = False
    """Stop at the first unreadable image instead of skipping and counting it."""
    prefetch: int = option(2, at_least(1))
    """Number of batches to copy to the devices in advance."""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """SGD with a cosine learning-rate schedule."""

    epochs: int = option(120, at_least(1))
    """Number of passes over the training split."""
    batch_size: int = option(256, at_least(1))
    """Global batch size: the number of images per step on all devices of all processes together."""
    accumulate: int = option(1, at_least(1))
    """Gradient accumulation: to save memory, each device processes its share of the batch in this many parts."""
    learning_rate: float = option(0.1, at_least(0))
    """Peak learning rate for a global batch size of 256. It is scaled linearly with --batch-size."""
    momentum: float = option(0.9, at_least(0), below(1))
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = option(1e-4, at_least(0))
    """Weight decay. It applies to convolution and linear kernels and to the BN weight of the identity branch only."""
    warmup_epochs: float = option(0.0, at_least(0))
    """Number of epochs in which the learning rate rises linearly from 0, before the cosine schedule."""
    label_smoothing: float = option(0.0, at_least(0), below(1))
    """Label smoothing: the fraction of the target that is spread evenly over all classes."""
    mixup: float = option(0.0, at_least(0))
    """Alpha of mixup; 0 turns it off. If CutMix is on too, each step uses one of the two, chosen at random."""
    cutmix: float = option(0.0, at_least(0))
    """Alpha of CutMix; 0 turns it off."""
    auxiliary_weight: float = option(0.1, at_least(0))
    """Weight of the loss of each auxiliary head (RepVGGplus only)."""
    clip_norm: float = option(0.0, at_least(0))
    """Maximum global norm of the gradient; 0 turns clipping off."""
    ema_decay: float = option(0.0, at_least(0), below(1))
    """Decay of the moving average of weights and BN statistics, such as 0.9999; 0 turns the average off."""


@dataclasses.dataclass(frozen=True)
class FineTuneOptions:
    """Initial weights, and the parts of the net to train."""

    init: str | None = option(None, weights_path)
    """Initial weights: a weight file in training form, or the name of a variant to use its ImageNet weights. If its
    classes differ from those of the data, in number or in name, the classifier is initialised anew."""
    keep_classifier: bool = False
    """Keep the classifier of --init if it has the same number of classes as the data under other names."""
    freeze_stages: int = option(0, at_least(0), at_most(5))
    """Freeze the weights and BN statistics of the first N of the five stages."""
    whiten_stem: bool = False
    """Compute the filters of stage 0 from the training images (PCA whitening of 3x3 patches), and do not train them.
    This improves the accuracy of short training runs. With --init, stage 0 comes from the file and is not trained."""
    freeze_bn: bool = False
    """Freeze the running BN statistics, and normalise with them during training."""
    head_learning_rate: float = option(1.0, at_least(0))
    """Learning rate of the classifier, as a multiple of --learning-rate."""

    @property
    def frozen_stages(self) -> int:
        """Number of stages, from the first, that are not trained."""
        return max(self.freeze_stages, int(self.whiten_stem))


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Runs with several processes. Not needed under SLURM or Open MPI or on TPU VMs, which set these values."""

    coordinator_address: str | None = None
    """Address of process 0, as HOST:PORT."""
    num_processes: int | None = None
    """Number of processes in the run."""
    process_id: int | None = None
    """Index of this process, starting at 0."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Output folder, logging, evaluation and checkpoints."""

    workdir: str = option("", option_place)
    """Output folder. Default: runs/PRESET-MODEL (runs/cifar10 for the net of that preset).
    Run the same command again to resume the run in this folder."""
    seed: int = option(0, at_least(0), below(2**63))
    """Seed for everything random: initial weights, order of the images, augmentation, mixup, dropout."""
    log_every: int = option(50, at_least(1))
    """Number of steps between rows of metrics.jsonl. Every epoch has at least one row."""
    evaluate_every: int = option(1, at_least(1))
    """Number of epochs between evaluations."""
    checkpoint_every: int = option(1000, at_least(1))
    """Number of steps between checkpoints. Every evaluation writes a checkpoint too."""
    keep_checkpoints: int = option(2, at_least(1))
    """Number of most recent checkpoints to keep. The best one is always kept."""
    profile: bool = False
    """Write a JAX trace of a few steps to WORKDIR/profile, for TensorBoard's profiler or Perfetto."""
    tracker: Literal["none", "wandb"] = "none"
    """Experiment tracker to use in addition to TensorBoard. wandb is Weights & Biases; the environment variables
    WANDB_MODE, WANDB_PROJECT and WANDB_NAME configure it."""
    preflight: str | None = None
    """Do not train: compile the run for another machine, and report whether it fits into its memory.
    The machine is a TPU slice, such as v5e:16x16, or a number of GPUs, such as h100:8. Needs neither that
    machine nor the data, and writes nothing."""
    preflight_largest: bool = False
    """With --preflight: also find the largest batch size that fits. This takes a few more compilations."""


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
        raise ConfigError("--quantization qat needs trained weights: pass a file in training form with --init")
    if recipe.run.preflight_largest and recipe.run.preflight is None:
        raise ConfigError("--preflight-largest needs --preflight TARGET")
    warmup, epochs = recipe.optimizer.warmup_epochs, recipe.optimizer.epochs
    if warmup >= epochs:
        raise ConfigError(f"--warmup-epochs must be less than --epochs, {epochs}, not {warmup:g}")
