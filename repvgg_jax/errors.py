"""Errors that a user can cause. Commands print them as one line on stderr and exit with status 2."""

import contextlib
from collections.abc import Iterable, Iterator


class RepVGGError(Exception):
    """Base class of all errors that invalid input can cause; the message is one clear sentence."""


class UnknownModelError(RepVGGError, ValueError):
    """A model name that is not in the table of published variants."""


class FusionError(RepVGGError, ValueError):
    """A parameter tree that cannot be re-parameterised: it is already fused, or has no running statistics."""


class WeightsError(RepVGGError):
    """A weight file that cannot be read, or that does not fit the requested model."""


class QuantizationError(RepVGGError, ValueError):
    """A net that cannot be quantised, or calibration images that are unsuitable for it."""


class ExportError(RepVGGError):
    """A failed export: a library is missing, or the exported file does not compute what the net does."""


class DataError(RepVGGError):
    """A data set that cannot be found or read, or a file that is not an image."""


class DataWarning(UserWarning):
    """An image that was skipped because it cannot be read."""


class ConfigError(RepVGGError, ValueError):
    """Options that are invalid, contradict each other, or do not suit the machine."""


def first_ten(names: Iterable[object]) -> str:
    """Return the first ten names and the number of others, always on one line."""
    names = list(names)
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more


def shown(name: object) -> str:
    """Return a name from an untrusted file in a form suitable for error messages: printable and of limited length."""
    text = name if isinstance(name, str) else f"a {type(name).__name__}"
    text = text if text and text.isprintable() else ascii(text[:200])
    return text if len(text) <= 200 else text[:197] + "…"


def reason_of(error: BaseException) -> str:
    """Return the reason for an error on one line: the system's text, else the exception's, else its class name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


@contextlib.contextmanager
def system_errors(kind: type[RepVGGError], doing: str, *others: type[Exception]) -> Iterator[None]:
    """Turn OSError, and `others`, inside the block into `kind`: "cannot read w.pth: Permission denied"."""
    try:
        yield
    except (OSError, *others) as error:
        raise kind(f"{doing}: {reason_of(error)}") from error
