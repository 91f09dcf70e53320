"""Options that every command which reads a weight file shares: what to take from it, and what it does not say."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..paths import expand_home
from .info import MAX_IMAGE_SIZE, WeightsInfo


@dataclasses.dataclass(frozen=True)
class WeightsOptions:
    """What to take from a weight file, and what it does not say, or says wrongly, of its images and classes."""

    ema: bool = False
    """Take the moving average of the weights, where a training checkpoint has one."""
    tensors_only: bool = False
    """Pass over pickled objects beside the weights instead of refusing the file. Runs none of its code either way."""
    prefix: str = ""
    """Take only what is named so, such as `encoder.`, out of a larger model. A net without classifier needs a class
    count, in Python and in `convert`."""
    epsilon: float | None = None
    """What BatchNorm added to the variance when the weights were trained. Native files say it; for others 1e-5 unless
    given. YOLO trainers and Keras take 1e-3."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, for pixel values in 0..1; the weight file's own unless given, as everything below."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""
    image_size: int | None = None
    """Height and width of the network's input, pixels."""
    crop_fraction: float | None = None
    """Share of the resized shorter side that the central crop keeps, above 0 and at most 1."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, by index: the names themselves, or a file with a name in each line or a JSON list."""

    @property
    def reading(self) -> dict[str, Any]:
        """Return the arguments of `load_weights` and `inspect_weights`.

        Raises:
          ConfigError: an epsilon that cannot be one.
        """
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ConfigError(f"--epsilon must be above 0 and below 1, not {self.epsilon}")
        return dict(ema=self.ema, tensors_only=self.tensors_only, epsilon=self.epsilon, prefix=self.prefix)

    def apply(self, info: WeightsInfo, num_classes: int | None = None) -> WeightsInfo:
        """Return `info` with what the options say.

        Args:
          info: what a weight file says of itself.
          num_classes: of a fresh classifier, where the file's is replaced.

        Raises:
          ConfigError: numbers that make no preprocessing, other than one for each channel, not one name for each class,
            or a file of names that cannot be read.
        """
        given = {name: getattr(self, name) for name in ("image_size", "crop_fraction", "mean", "std")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"--image-size must be at least 1, not {self.image_size}")
        if self.image_size is not None and self.image_size > MAX_IMAGE_SIZE:
            raise ConfigError(f"--image-size must be at most {MAX_IMAGE_SIZE}, not {self.image_size}")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"--crop-fraction must be above 0 and at most 1, not {self.crop_fraction}")
        for name in {"mean", "std"} & given.keys():
            if len(given[name]) != info.in_channels:
                wanted, count = info.in_channels, len(given[name])
                raise ConfigError(f"--{name} needs one number for each of {wanted} channels, not {count}")
            if not all(map(math.isfinite, given[name])):
                raise ConfigError(f"--{name} must be finite, not {' '.join(map(str, given[name]))}")
        try:
            preprocessing = dataclasses.replace(info.preprocessing, **given)
        except ValueError as error:
            raise ConfigError(f"{error}") from error
        classes = num_classes or info.num_classes
        class_names = info.class_names if classes == info.num_classes else None
        if self.class_names is not None:
            class_names = _read_names(self.class_names)
            if len(class_names) != classes:
                count = f"{len(class_names)} name{'s' * (len(class_names) != 1)}"
                hint = f"; there is no file called {self.class_names[0]}" if class_names == self.class_names[:1] else ""
                raise ConfigError(f"--class-names gives {count} for {classes} classes{hint}")
        return dataclasses.replace(info, preprocessing=preprocessing, class_names=class_names)


def _read_names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names, or those in a file if a file's name is all that is given."""
    path = Path(expand_home(given[0])) if len(given) == 1 else None
    try:
        if path is None or not os.path.isfile(path):  # noqa: PTH113 (Path's own raises where a name is too long)
            return given
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("["):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        names = json.loads(text)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("its list holds something other than names")
        return tuple(names)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --class-names {path}: {error}") from error
