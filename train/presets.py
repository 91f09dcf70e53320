"""Named recipes, and `parse`, which builds a recipe from one of them and the command line.

Sources: paper section 4.1 and the authors' repository (`imagenet_120`, `imagenet_200`, `plus_300`).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from repvgg_jax.errors import ConfigError
from repvgg_jax.net.variants import list_models

from .data.augmentation import Augmentation
from .data.datasets import DATA_SETS
from .recipe import FineTuneOptions, InputOptions, ModelOptions, OptimizerOptions, Recipe, RunOptions, check_recipe

_IMAGENET = InputOptions(data="imagenet2012")


def _prepared_as(name: str) -> InputOptions:
    """Return a data set's options from the table, to apply them to its images in a folder too, which has no row."""
    row = DATA_SETS[name]
    return InputOptions(
        data=name,
        image_size=row.train_size,
        test_image_size=row.test_size,
        crop_fraction=row.crop_fraction,
        mean=row.mean,
        std=row.std,
        train_transform=row.train_transform,
    )


PRESETS: dict[str, Recipe] = {
    # The demo: real 8x8 scans, minutes on a laptop.
    "digits": Recipe(
        model=ModelOptions("RepVGG-A0"),
        input=InputOptions(data="digits", image_size=32, test_image_size=32),
        optimizer=OptimizerOptions(
            epochs=30, batch_size=64, learning_rate=0.1, weight_decay=1e-4, warmup_epochs=2, label_smoothing=0.1
        ),
        run=RunOptions(log_every=22, evaluate_every=5, checkpoint_every=110),
    ),
    # Photographs of 32 pixels, a net of 1.8 M parameters in deploy form; an hour on two cores (docs/experiments.md).
    "cifar10": Recipe(
        model=ModelOptions(
            "RepVGG-A0", num_blocks=(2, 2, 2, 1), widths=(32, 64, 128, 256, 256), strides=(1, 2, 2, 2, 1)
        ),
        input=_prepared_as("cifar10"),
        augment=Augmentation(
            auto_augment="randaugment", randaugment_ops=1, randaugment_magnitude=7, random_erasing=0.25
        ),
        optimizer=OptimizerOptions(
            epochs=32,
            batch_size=128,
            learning_rate=0.2,
            nesterov=True,
            weight_decay=5e-4,
            warmup_epochs=2,
            label_smoothing=0.1,
        ),
        fine_tune=FineTuneOptions(whiten_stem=True),
        run=RunOptions(log_every=100, evaluate_every=2),
    ),
    # Paper, section 4.1: A0 to B2.
    "imagenet_120": Recipe(model=ModelOptions("RepVGG-A0"), input=_IMAGENET),
    # Paper, section 4.1: B2g4, B3g4, B3.
    "imagenet_200": Recipe(
        model=ModelOptions("RepVGG-B3"),
        input=_IMAGENET,
        augment=Augmentation(auto_augment="autoaugment"),
        optimizer=OptimizerOptions(epochs=200, label_smoothing=0.1, mixup=0.2),
    ),
    # The authors' RepVGGplus recipe.
    "plus_300": Recipe(
        model=ModelOptions("RepVGGplus-L2pse", dtype="bfloat16"),
        input=dataclasses.replace(_IMAGENET, image_size=256),
        augment=Augmentation(auto_augment="randaugment_plus", randaugment_magnitude=15),
        optimizer=OptimizerOptions(
            epochs=300, nesterov=True, weight_decay=4e-5, warmup_epochs=5, label_smoothing=0.1, mixup=0.2
        ),
    ),
}


def parse(arguments: Sequence[str] | None = None) -> Recipe:
    """Return the recipe that command-line `arguments` (`sys.argv[1:]` if None) describe.

    Exits with status 2 and a message on stderr if they cannot be parsed.

    Raises:
      ConfigError: no preset is named, or an option's value is invalid.
      UnknownModelError: there is no such variant.
    """
    import tyro  # here, so that recipes can be read where only JAX is installed

    from repvgg_jax.command_errors import one_line_errors
    from repvgg_jax.command_help import plain_help

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names = ", ".join(PRESETS)
    preset = _value_of("--preset", arguments)
    if preset is None and not _has(arguments, "--help", "-h"):
        raise ConfigError(f"--preset is missing: name the recipe to start from, one of {names}")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {names}, not {preset}")

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        preset: Annotated[str, tyro.conf.arg(metavar=f"{{{names.replace(' ', '')}}}", help=_PRESET_HELP)]
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]

    base = PRESETS[preset or "digits"]  # the preset determines the defaults of all other options
    if _has(arguments, "--model"):  # the preset's depth, widths and stem are for its own net
        base = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, num_blocks=None, widths=None),
            fine_tune=dataclasses.replace(base.fine_tune, whiten_stem=False),
        )
    with one_line_errors():
        chosen = tyro.cli(
            CommandLine,
            prog="python -m train.main",
            description=(
                "Train a RepVGG net, evaluate its training and deploy forms, and write them to final.safetensors and "
                "deploy.safetensors. Run the same command again to resume an interrupted run."
            ),
            default=CommandLine(preset or tyro.MISSING, base),
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
            registry=plain_help(),
        )
    recipe = chosen.recipe
    if not recipe.run.workdir:
        workdir = str(Path("runs") / f"{preset}{_suffix(recipe.model, base.model)}")
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, workdir=workdir))
    if not _has(arguments, "--warmup-epochs"):
        recipe = dataclasses.replace(recipe, optimizer=_fitting_warmup(recipe.optimizer, base.optimizer))
    check_recipe(recipe)
    return recipe


_PRESET_HELP = (
    "Recipe to start from. The options below override its values. The defaults shown are those of digits, or, with "
    "--preset NAME --help, those of that preset."
)


def _has(arguments: Sequence[str], *options: str) -> bool:
    """Return whether one of these options is among the arguments; tyro accepts underscores for hyphens."""
    return any(argument.partition("=")[0].replace("_", "-") in options for argument in arguments)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the value of an option; None if it is missing."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else next(iter(arguments[position + 1 :]), "")
    return None


def _suffix(options: ModelOptions, preset: ModelOptions) -> str:
    """Return the suffix of a run's default folder: the variant's name, or that of the file that defines it."""
    numbers = (options.num_blocks, options.widths)
    if numbers != (None, None):
        return "" if numbers == (preset.num_blocks, preset.widths) else "-custom"
    return f"-{options.model if options.model in list_models() else Path(options.model).stem}"


def _fitting_warmup(options: OptimizerOptions, preset: OptimizerOptions) -> OptimizerOptions:
    """Shorten the preset's warm-up to the same share of the epochs if it does not fit into them."""
    if not 1 <= options.epochs <= options.warmup_epochs:
        return options
    warmup = round(preset.warmup_epochs / preset.epochs * options.epochs, 4)
    print(
        f"note: the preset's {preset.warmup_epochs:g} warm-up epochs do not fit into {options.epochs} epochs; "
        f"shortened to {warmup:g}",
        file=sys.stderr,
    )
    return dataclasses.replace(options, warmup_epochs=warmup)
