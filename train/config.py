"""Everything a training run can be told, as one frozen tree; presets are values of it.

Recipes: paper section 4.1 and the authors' repository (`imagenet_120`, `imagenet_200`, `plus_300`).
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from repvgg_jax.errors import ConfigError
from repvgg_jax.net.branches import MAX_DENSE_COPIES, BlockKind, Branches
from repvgg_jax.net.variants import get_variant
from repvgg_jax.paths import local_path
from repvgg_jax.weights.hub import weights_path

from .data.augmentation import Augmentation


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = "RepVGG-A0"
    """Variant, one of `rv.list_models()`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype; parameters, BN statistics, logits and loss stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more compute."""
    block: BlockKind = "repvgg"
    """Training form's block: RepVGG's, or QARepVGG's for INT8."""
    dense_copies: int = 1
    """3x3 branches in each block (MobileOne)."""
    dbb_1x1_3x3: bool = False
    """A branch of 1x1 and 3x3 convolution in each block (Diverse Branch Block)."""
    dbb_1x1_avg: bool = False
    """A branch of 1x1 convolution and average pooling in each block (Diverse Branch Block)."""
    activation: Literal["relu", "relu6", "leaky_relu", "gelu", "silu"] = "relu"
    stem_stride: Literal[1, 2] = 2
    """Stride of the first block; 1 for images as small as 32x32."""
    epsilon: float | None = None
    """What BatchNorm adds to the variance; that of a native --init file if not given, else 1e-5."""
    dropout: float = 0.0
    """Share of the pooled features dropped before the classifier."""
    quantization: Literal["none", "qat"] = "none"
    """qat: train the deployed INT8 net itself, starting from the finished training of --init."""

    @property
    def branches(self) -> Branches:
        """The blocks' further branches."""
        return Branches(self.dense_copies, self.dbb_1x1_3x3, self.dbb_1x1_avg)


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """What it is trained on."""

    data: str = "digits"
    """A TFDS name, a folder with train/CLASS/* and val/CLASS/*, `digits`, or `synthetic`."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets; TFDS_DATA_DIR or ~/tensorflow_datasets if not given."""
    train_split: str | None = None
    """Training split of a TFDS data set, or a slice of one, such as train[:90%]; `train` if not given."""
    test_split: str | None = None
    """Evaluation split, such as train[90%:]; `validation`, or else `test`, if not given."""
    image_size: int = 224
    """Side of the training crops, pixels: the recipe's, whatever the variant. The authors too train RepVGG-D2se at 224
    and evaluate it at 320."""
    test_image_size: int | None = None
    """Side of the evaluation crops, pixels; the variant's published one if not given."""
    crop_fraction: float | None = None
    """Share of the resized shorter side that an evaluation crop keeps; the variant's published one if not given, and 1
    for digits and synthetic images."""
    workers: int | None = None
    """Threads that decode images; one for each core if not given. Results do not depend on it."""
    strict: bool = False
    """Stop at an unreadable image instead of skipping and counting it."""
    prefetch: int = 2
    """Batches copied to the devices ahead of the step that needs them."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How it is trained: SGD on a cosine schedule, per step."""

    epochs: int = 120
    """Passes over the training split."""
    batch_size: int = 256
    """Global batch, over all devices of all processes."""
    accumulate: int = 1
    """Portions that each device walks its share of the batch in, to save memory; gradients are averaged over them."""
    learning_rate: float = 0.1
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    """On convolution and linear kernels and on rbr_identity's BN weight, nothing else."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0 before the cosine."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Mixup's alpha; 0 is off. With CutMix on too, each is drawn half the time."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 is off."""
    auxiliary_weight: float = 0.1
    """Weight of each auxiliary head's loss (RepVGGplus)."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights and BN statistics, such as 0.9999; 0 keeps none."""


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """Where it starts, and what of it trains."""

    init: str | None = None
    """Weight file to start from, anything that `rv.load_weights` reads, in training form; classes other than the
    data's, in number or by name, give a fresh classifier."""
    keep_classifier: bool = False
    """Keep the classifier of --init though the file names other classes than the data, as many of them."""
    freeze_stages: int = 0
    """How many of the five stages, from the first, keep their weights and BN statistics."""
    freeze_bn: bool = False
    """Use the running BN statistics and leave them alone."""
    head_learning_rate: float = 1.0
    """Factor on the classifier's learning rate."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Which of several processes this is; found in the cluster's environment if none is given."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where it goes and how often it is looked at."""

    workdir: str = ""
    """Folder of the run; runs/PRESET-MODEL if not given. The same command again resumes it."""
    seed: int = 0
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    evaluate_every: int = 1
    """Epochs between evaluations."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one more is written at every evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    profile: bool = False
    """Write a JAX trace of a few steps into the run's folder, for TensorBoard's profiler or Perfetto."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    augment: Augmentation = Augmentation()
    optimizer: OptimizerConfig = OptimizerConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()


MAX_CROP_SIZE = 4096
"""Largest side of a run's crops, pixels: one image of A0 takes gigabytes then. Predictions, which need less, have
`MAX_IMAGE_SIZE` of `weights/info.py`."""

_IMAGENET = InputConfig(data="imagenet2012")

PRESETS: dict[str, Config] = {
    # Real 8x8 scans, minutes on a laptop: the demo.
    "digits": Config(
        model=ModelConfig("RepVGG-A0"),
        input=InputConfig(data="digits", image_size=32, test_image_size=32),
        optimizer=OptimizerConfig(
            epochs=30, batch_size=64, learning_rate=0.1, weight_decay=1e-4, warmup_epochs=2, label_smoothing=0.1
        ),
        run=RunConfig(log_every=22, evaluate_every=5, checkpoint_every=110),
    ),
    # Paper, section 4.1: A0 to B2.
    "imagenet_120": Config(model=ModelConfig("RepVGG-A0"), input=_IMAGENET),
    # Paper, section 4.1: B2g4, B3g4, B3.
    "imagenet_200": Config(
        model=ModelConfig("RepVGG-B3"),
        input=_IMAGENET,
        augment=Augmentation(auto_augment="autoaugment"),
        optimizer=OptimizerConfig(epochs=200, label_smoothing=0.1, mixup=0.2),
    ),
    # The authors' RepVGGplus recipe.
    "plus_300": Config(
        model=ModelConfig("RepVGGplus-L2pse", dtype="bfloat16"),
        input=dataclasses.replace(_IMAGENET, image_size=256),
        augment=Augmentation(auto_augment="randaugment_plus", randaugment_magnitude=15),
        optimizer=OptimizerConfig(
            epochs=300, nesterov=True, weight_decay=4e-5, warmup_epochs=5, label_smoothing=0.1, mixup=0.2
        ),
    ),
}


PresetName = Literal["digits", "imagenet_120", "imagenet_200", "plus_300"]


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    preset: PresetName
    """Recipe to start from; every option below changes one number of it."""
    config: Config


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that command-line `arguments` (`sys.argv[1:]` if None) ask for.

    Exits with status 2 and a message on stderr when they cannot be understood.

    Raises:
      ConfigError: no preset is named, or they are understood but make no sense.
    """
    import tyro  # here, so that recipes can be read where only JAX is installed

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset = _preset_name(arguments)
    if preset is None and not _given(arguments, "--preset", "--help", "-h"):
        raise ConfigError(f"--preset is missing: name the recipe to start from, one of {', '.join(PRESETS)}")
    base = PRESETS[preset or "digits"]
    chosen = tyro.cli(
        _CommandLine,
        prog="python -m train.main",
        description="Train a RepVGG, evaluate it in both forms, write final.safetensors and deploy.safetensors.",
        default=_CommandLine(preset or tyro.MISSING, base),  # the preset decides every other option's default
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = chosen.config
    if not config.run.workdir:
        workdir = str(Path("runs") / f"{chosen.preset}-{config.model.model}")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=workdir))
    if not _given(arguments, "--warmup-epochs"):
        config = dataclasses.replace(config, optimizer=_fitting_warmup(config.optimizer, base.optimizer))
    check(config)
    return config


def _given(arguments: Sequence[str], *options: str) -> bool:
    """Whether one of these options is among the arguments; tyro takes underscores for hyphens."""
    return any(argument.partition("=")[0].replace("_", "-") in options for argument in arguments)


def _fitting_warmup(options: OptimizerConfig, preset: OptimizerConfig) -> OptimizerConfig:
    """`options` with the preset's warm-up, shortened to its share of the preset's epochs where it does not fit."""
    if not 1 <= options.epochs <= options.warmup_epochs:
        return options
    warmup = round(preset.warmup_epochs / preset.epochs * options.epochs, 4)
    print(
        f"note: the preset's {preset.warmup_epochs:g} epochs of warm-up do not fit into {options.epochs}; "
        f"shortened to {warmup:g}",
        file=sys.stderr,
    )
    return dataclasses.replace(options, warmup_epochs=warmup)


def _preset_name(arguments: Sequence[str]) -> PresetName | None:
    """The value of `--preset`; None if it is missing or unknown."""
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--preset":
            value = value or next(iter(arguments[position + 1 :]), "")
            for name in get_args(PresetName):
                if name == value:
                    return name
    return None


def check(config: Config) -> None:
    """Refuse numbers that no run can use.

    Raises:
      ConfigError: names the option, its value and what it must be.
      UnknownModelError: no such variant.
    """
    get_variant(config.model.model)
    at_least = {
        "--dense-copies": (config.model.dense_copies, 1),
        "--dropout": (config.model.dropout, 0),
        "--image-size": (config.input.image_size, 1),
        "--test-image-size": (1 if config.input.test_image_size is None else config.input.test_image_size, 1),
        "--workers": (1 if config.input.workers is None else config.input.workers, 1),
        "--epochs": (config.optimizer.epochs, 1),
        "--batch-size": (config.optimizer.batch_size, 1),
        "--learning-rate": (config.optimizer.learning_rate, 0),
        "--momentum": (config.optimizer.momentum, 0),
        "--weight-decay": (config.optimizer.weight_decay, 0),
        "--warmup-epochs": (config.optimizer.warmup_epochs, 0),
        "--label-smoothing": (config.optimizer.label_smoothing, 0),
        "--auxiliary-weight": (config.optimizer.auxiliary_weight, 0),
        "--accumulate": (config.optimizer.accumulate, 1),
        "--mixup": (config.optimizer.mixup, 0),
        "--cutmix": (config.optimizer.cutmix, 0),
        "--clip-norm": (config.optimizer.clip_norm, 0),
        "--ema-decay": (config.optimizer.ema_decay, 0),
        "--prefetch": (config.input.prefetch, 1),
        "--freeze-stages": (config.fine_tune.freeze_stages, 0),
        "--head-learning-rate": (config.fine_tune.head_learning_rate, 0),
        "--seed": (config.run.seed, 0),
        "--log-every": (config.run.log_every, 1),
        "--evaluate-every": (config.run.evaluate_every, 1),
        "--checkpoint-every": (config.run.checkpoint_every, 1),
        "--keep-checkpoints": (config.run.keep_checkpoints, 1),
    }
    for option, (value, least) in at_least.items():
        if not value >= least:
            raise ConfigError(f"{option} must be at least {least}, not {value}")
        if value == math.inf:
            raise ConfigError(f"{option} must be finite, not {value}")
    for option, value in (
        ("--dropout", config.model.dropout),
        ("--momentum", config.optimizer.momentum),
        ("--label-smoothing", config.optimizer.label_smoothing),
        ("--ema-decay", config.optimizer.ema_decay),
    ):
        if value >= 1:
            raise ConfigError(f"{option} must be below 1, not {value}")
    if config.input.crop_fraction is not None and not 0 < config.input.crop_fraction <= 1:
        raise ConfigError(f"--crop-fraction must be above 0 and at most 1, not {config.input.crop_fraction}")
    epsilon = config.model.epsilon
    if epsilon is not None and not 0 < epsilon < 1:
        raise ConfigError(f"--epsilon must be above 0 and below 1, not {epsilon}")
    if config.model.dense_copies > MAX_DENSE_COPIES:
        raise ConfigError(f"--dense-copies must be at most {MAX_DENSE_COPIES}, not {config.model.dense_copies}")
    if config.model.quantization == "qat" and config.fine_tune.init is None:
        raise ConfigError("--quantization qat fine-tunes a trained net: give its training form with --init")
    for option, side in (
        ("--image-size", config.input.image_size),
        ("--test-image-size", config.input.test_image_size),
    ):
        if side is not None and side > MAX_CROP_SIZE:
            raise ConfigError(f"{option} must be at most {MAX_CROP_SIZE}, not {side}")
    for option, path in (
        ("--workdir", config.run.workdir),
        ("--data", config.input.data),
        ("--data-dir", config.input.data_dir),
    ):
        if path is not None:
            local_path(option, path)
    if config.fine_tune.init is not None:
        weights_path("--init", config.fine_tune.init)
    if config.run.seed >= 2**63:
        raise ConfigError(f"--seed must be below 2^63, not {config.run.seed}")
    if config.fine_tune.freeze_stages > 5:
        raise ConfigError(f"--freeze-stages must be at most 5, not {config.fine_tune.freeze_stages}")
    if config.optimizer.warmup_epochs >= config.optimizer.epochs:
        raise ConfigError(
            f"--warmup-epochs {config.optimizer.warmup_epochs:g} leaves nothing of {config.optimizer.epochs} --epochs"
        )
