"""What a file of ours says of the net in it: one JSON object, in a native file's header or beside a foreign one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import WeightsError, shown
from ..net.activations import ACTIVATIONS
from ..net.variants import OUTPUT_STRIDES, Branches, Variant, checked_epsilon, get_variant
from ..preprocess import Preprocessing
from .info import preprocessing_from_file

FORMAT_VERSION = 1
TRAINING, DEPLOY, INT8 = "training", "deploy", "int8"
IS_DEPLOY = {TRAINING: False, DEPLOY: True, INT8: True}
"""The forms of a net that a file can hold."""

MAX_STEPS = 2**63 - 1
"""Of a BN step counter, which PyTorch keeps as int64."""


@dataclasses.dataclass(frozen=True)
class Header:
    """A net, without its numbers.

    Attributes:
      form: one of `IS_DEPLOY`.
      variant: the architecture.
      num_classes: width of the classifier.
      preprocessing: how images are prepared.
      class_names: names by class index, if they are known.
      num_batches_tracked: training steps that the BN statistics have seen, if known.
    """

    form: str
    variant: Variant
    num_classes: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    num_batches_tracked: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The header as JSON types."""
        fields = {
            "version": FORMAT_VERSION,
            "variant": variant_to_json(self.variant),
            "form": self.form,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": None if self.class_names is None else list(self.class_names),
        }
        if self.num_batches_tracked is not None:
            fields["num_batches_tracked"] = self.num_batches_tracked
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str, num_tensors: int, expected: Variant | None) -> "Header":
        """Read what `to_json` wrote, or somebody else.

        Args:
          fields: the JSON object.
          where: what to call its file.
          num_tensors: in the net's file; it has no more blocks than those.
          expected: where the activation comes from if it is a function, which a file cannot hold.

        Raises:
          WeightsError: a later release's, or an activation that is not known.
          ValueError, KeyError, TypeError, AttributeError, RecursionError: a damaged header.
        """
        if fields["version"] > FORMAT_VERSION:
            raise WeightsError(f"{where} has format version {fields['version']}; this release reads {FORMAT_VERSION}")
        class_names, steps = fields["class_names"], fields.get("num_batches_tracked")
        header = cls(
            form=fields["form"],
            variant=variant_from_json(fields["variant"], where, num_tensors, expected),
            num_classes=integer(fields["num_classes"]),
            preprocessing=preprocessing_from_file(fields["preprocessing"]),
            class_names=None if class_names is None else tuple(map(str, class_names)),
            num_batches_tracked=None if steps is None else integer(steps, largest=MAX_STEPS),
        )
        if header.form not in IS_DEPLOY:
            raise KeyError(header.form)
        if header.class_names is not None and len(header.class_names) != header.num_classes:
            raise ValueError(f"{len(header.class_names)} class names for {header.num_classes} classes")
        return header


def variant_to_json(variant: Variant) -> str | dict[str, Any]:
    """A published variant by name, any other by its numbers; of its options, those that are not RepVGG's own.

    An activation that is a function has no name: it is null.
    """
    fields = dataclasses.asdict(variant)
    del fields["published"]
    if not isinstance(variant.activation, str):
        fields["activation"] = None
    for name, default in _OPTIONS.items():
        if getattr(variant, name) == default:
            del fields[name]
    try:
        return variant.name if get_variant(variant.name) == variant else fields
    except ValueError:
        return fields


def variant_from_json(value: str | dict[str, Any], where: str, num_tensors: int, expected: Variant | None) -> Variant:
    if isinstance(value, str):
        return get_variant(value)
    fields = {name: _FIELDS[name](given) for name, given in value.items()}
    if sum(fields["num_blocks"]) > num_tensors:
        raise ValueError("more blocks than tensors")
    if "activation" in fields and fields["activation"] is None:
        if expected is None:
            raise WeightsError(
                f"{where}: the activation is a function of whoever wrote the file; give load_weights its Variant"
            )
        fields["activation"] = expected.activation
    return Variant(**fields)


def integer(value: Any, least: int = 0, largest: int = 2**31) -> int:
    """Return `value`, if it is a whole number within bounds.

    Raises:
      ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= largest:
        raise ValueError("a number that is no sensible integer")
    return value


def _positive(value: Any) -> int:
    return integer(value, least=1)


def _several(value: Any) -> tuple[int, ...]:
    return tuple(map(integer, value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _place(value: Any) -> str | None:
    if value not in (None, "before_relu", "after_relu"):
        raise ValueError("an unknown place for the squeeze-and-excite gate")
    return value


def _fraction(value: Any) -> float:
    if not isinstance(value, float | int) or not 0 < value <= 1:
        raise ValueError("a fraction outside of 0..1")
    return float(value)


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"none of {', '.join(map(str, choices))}")
        return value

    return check


def _activation(value: Any) -> Any:
    return None if value is None else _one_of(*ACTIVATIONS)(value)


def _branches(value: Any) -> Branches:
    checks = {"dense_copies": _positive, "dbb_1x1_3x3": _flag, "dbb_1x1_avg": _flag}
    return Branches(**{name: checks[name](given) for name, given in value.items()})


_OPTIONS = {
    field.name: field.default
    for field in dataclasses.fields(Variant)
    if field.name in ("stem_stride", "output_stride", "activation", "block", "branches", "epsilon")
}
"""Fields that files of earlier releases do not have, and their defaults."""

_FIELDS: dict[str, Callable[[Any], Any]] = {
    "num_blocks": _several,
    "widths": _several,
    "groups": _positive,
    "squeeze_excite": _place,
    "squeeze_excite_ratio": _positive,
    "auxiliary_heads": _flag,
    "name": shown,
    "image_size": _positive,
    "crop_fraction": _fraction,
    "stem_stride": _one_of(1, 2),
    "output_stride": _one_of(*OUTPUT_STRIDES),
    "activation": _activation,
    "block": _one_of("repvgg", "qarepvgg"),
    "branches": _branches,
    "epsilon": checked_epsilon,
}
"""A variant's fields in a header, each with the check that makes it one."""
