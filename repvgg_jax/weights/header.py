"""Description of a net as a JSON object, in a native file's header or in the side file of another family's file."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import WeightsError, first_ten, shown
from ..net.branches import Branches
from ..net.variants import Variant, get_variant
from ..preprocess import Preprocessing
from ..version import __version__
from .info import preprocessing_from_file

FORMAT_VERSION = 1
TRAINING, DEPLOY, INT8 = "training", "deploy", "int8"
IS_DEPLOY = {TRAINING: False, DEPLOY: True, INT8: True}
"""Forms of a net that a file can hold -> whether it is a deploy form."""

FIELDS = {"version", "release", "variant", "form", "num_classes", "preprocessing", "class_names"}
FIELDS |= {"num_batches_tracked", "crc32"}
"""Fields of the JSON object."""

MAX_STEPS = 2**63 - 1
"""Maximum of a BN step counter, which is int64 in PyTorch."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Description of a net without its weights.

    Attributes:
      form: one of `IS_DEPLOY`.
      variant: the architecture.
      num_classes: number of classes.
      preprocessing: how images are prepared.
      class_names: names by class index, or None.
      num_batches_tracked: training steps that the BN statistics have seen, or None.
    """

    form: str
    variant: Variant
    num_classes: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    num_batches_tracked: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the header as a JSON-compatible dict."""
        fields = {
            "version": FORMAT_VERSION,
            "release": __version__,
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
        """Read a header written by `to_json`, without trusting it.

        Args:
          fields: the JSON object.
          where: name of the file, for messages.
          num_tensors: number of tensors in the net's file, which bounds the number of blocks.
          expected: supplies the activation if it is a function, which a file cannot hold.

        Raises:
          WeightsError: the header is of a later release or has unknown fields, or the activation is unknown.
          ValueError, KeyError, TypeError, AttributeError, RecursionError: the header is damaged.
        """
        if fields["version"] > FORMAT_VERSION:
            raise WeightsError(f"{where} has format version {fields['version']}; this release reads {FORMAT_VERSION}")
        _check_names(fields, FIELDS, where, fields)
        _check_names(fields["preprocessing"], _names(Preprocessing), where, fields)
        class_names, steps = fields["class_names"], fields.get("num_batches_tracked")
        header = cls(
            form=fields["form"],
            variant=variant_from_json(fields, where, num_tensors, expected),
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
    """Return the name of a published variant; for any other, a dict of the fields that are not at their defaults.

    An activation that is a function has no name and becomes None.
    """
    try:
        if get_variant(variant.name) == variant:
            return variant.name
    except ValueError:
        pass
    fields = _without_defaults(variant)
    fields.pop("published", None)
    if not isinstance(variant.activation, str):
        fields["activation"] = None
    if "branches" in fields:
        fields["branches"] = _without_defaults(variant.branches)
    return fields


def _without_defaults(record: Any) -> dict[str, Any]:
    """Return a dataclass's fields except those at their defaults, so that earlier releases can read the result."""
    values = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {field.name: value for field, value in values if value != field.default}


def variant_from_json(header: Mapping[str, Any], where: str, num_tensors: int, expected: Variant | None) -> Variant:
    """Return the variant in a header; arguments and errors as for `Header.from_json`."""
    described = header["variant"]
    if isinstance(described, str):
        return get_variant(described)
    fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in described.items()}
    if "stem_stride" in fields:  # in files written before each stage had a stride
        fields["strides"] = (fields.pop("stem_stride"), *Variant.strides[1:])
    _check_names(fields, _names(Variant) - {"published"}, where, header)
    if "branches" in fields:
        _check_names(fields["branches"], _names(Branches), where, header)
        fields["branches"] = Branches(**fields["branches"])
    if sum(fields["num_blocks"]) > num_tensors:
        raise ValueError("more blocks than tensors")
    if fields.get("activation", "") is None:
        if expected is None:
            raise WeightsError(
                f"{where}: the activation is a Python function, which a file cannot hold; pass load_weights its Variant"
            )
        fields["activation"] = expected.activation
    fields["name"] = shown(fields.get("name", Variant.name))
    return Variant(**fields)


def _names(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def _check_names(fields: Mapping[str, Any], names: set[str], where: str, header: Mapping[str, Any]) -> None:
    """Raise WeightsError if there is a field that this release does not know."""
    unknown = sorted(fields.keys() - names, key=str)
    if unknown:
        written = f"; it was written by release {shown(header['release'])} of repvgg-jax" if "release" in header else ""
        release = f"this release ({__version__})"
        raise WeightsError(f"{where} has fields that {release} does not know: {first_ten(unknown)}{written}")


@contextlib.contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """Turn exceptions of reading damaged JSON inside the block into a WeightsError: "WHAT (ValueError: …)"."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{what} ({shown(f'{type(error).__name__}: {error}')})") from error


def integer(value: Any, least: int = 0, largest: int = 2**31) -> int:
    """Return `value` if it is an integer within bounds.

    Raises:
      ValueError: `value` is not an integer within these bounds.
    """
    if type(value) is not int or not least <= value <= largest:
        raise ValueError("a number that is not a valid integer")
    return value
