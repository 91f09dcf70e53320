"""Options shared by all commands that read a weight file."""

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
    """How to read the weight file, and values to use instead of those in it. Options not set keep the file's values."""

    ema: bool = False
    """Load the moving average (EMA) of the weights that a training checkpoint may contain."""
    tensors_only: bool = False
    """Load only the tensors of a file that also has other pickled objects, instead of refusing it. Code in the file is
    never run."""
    prefix: str = ""
    """Load only the tensors whose names begin with this prefix, such as encoder., from the file of a larger model."""
    epsilon: float | None = None
    """Epsilon of BatchNorm in training. YOLO trainers and Keras use 1e-3. Default: the value in the file, which native
    files record, or else 1e-5."""
    mean: tuple[float, ...] | None = None
    """Mean of each colour channel, for pixel values from 0 to 1."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each colour channel, for pixel values from 0 to 1."""
    image_size: int | None = None
    """Height and width of the network's input in pixels."""
    crop_fraction: float | None = None
    """Size of the centre crop as a fraction of the resized shorter side, above 0 and at most 1."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in order: the names themselves, or a file with one name per line or with a JSON list."""

    @property
    def reading(self) -> dict[str, Any]:
        """Return the keyword arguments for `load_weights` and `inspect_weights`.

        Raises:
          ConfigError: the epsilon is out of range.
        """
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise ConfigError(f"--epsilon must be above 0 and below 1, not {self.epsilon}")
        return dict(ema=self.ema, tensors_only=self.tensors_only, epsilon=self.epsilon, prefix=self.prefix)

    def apply(self, info: WeightsInfo, num_classes: int | None = None) -> WeightsInfo:
        """Return `info` with the options' values.

        Args:
          info: a weight file's description.
          num_classes: number of classes of a new classifier that replaces the file's.

        Raises:
          ConfigError: a value is invalid, there is not one number per channel or one name per class, or the file of
            names cannot be read.
        """
        overrides = {name: getattr(self, name) for name in ("image_size", "crop_fraction", "mean", "std")}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"--image-size must be at least 1, not {self.image_size}")
        if self.image_size is not None and self.image_size > MAX_IMAGE_SIZE:
            raise ConfigError(f"--image-size must be at most {MAX_IMAGE_SIZE}, not {self.image_size}")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"--crop-fraction must be above 0 and at most 1, not {self.crop_fraction}")
        for name in {"mean", "std"} & overrides.keys():
            if len(overrides[name]) != info.in_channels:
                wanted, count = info.in_channels, len(overrides[name])
                raise ConfigError(f"--{name} needs one number for each of {wanted} channels, not {count}")
            if not all(map(math.isfinite, overrides[name])):
                raise ConfigError(f"--{name} must be finite, not {' '.join(map(str, overrides[name]))}")
        try:
            preprocessing = dataclasses.replace(info.preprocessing, **overrides)
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


def _read_names(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names, or those in a file if there is a single entry and it is a file's name."""
    path = Path(expand_home(values[0])) if len(values) == 1 else None
    try:
        if path is None or not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises if a name is too long)
            return values
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("["):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        names = json.loads(text)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("its JSON list must contain only strings")
        return tuple(names)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --class-names {path}: {error}") from error
