"""Errors that a user can cause. Commands print them as one line on stderr and exit with status 2."""

import contextlib
from collections.abc import Iterable, Iterator


class RepVGGError(Exception):
    """Base of every error that bad input can cause; its text is one clear sentence."""


class UnknownModelError(RepVGGError, ValueError):
    """A model name that is not in the table of published variants."""


class FusionError(RepVGGError, ValueError):
    """A parameter tree that cannot be re-parameterised: already fused, or without running statistics."""


class WeightsError(RepVGGError):
    """A weight file that cannot be read, or that does not fit the model asked for."""


class QuantizationError(RepVGGError, ValueError):
    """A net that cannot be quantised, or calibration images that it cannot be quantised with."""


class ExportError(RepVGGError):
    """A net that cannot be written for another runtime: a library is missing, or the file computes something else."""


class DataError(RepVGGError):
    """A data set that cannot be found or read, or an image that is no image."""


class DataWarning(UserWarning):
    """An image that was left out because it cannot be read."""


class ConfigError(RepVGGError, ValueError):
    """Training options that contradict each other or the machine."""


def first_ten(names: Iterable[object]) -> str:
    """Return the first ten names and how many follow, on one line whatever the names hold."""
    names = list(names)
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more


def shown(name: object) -> str:
    """Return a name from a file of unknown origin, fit for an error message: printable and of bounded length."""
    text = name if isinstance(name, str) else f"a {type(name).__name__}"
    text = text if text and text.isprintable() else ascii(text[:200])
    return text if len(text) <= 200 else text[:197] + "…"


def reason_of(error: BaseException) -> str:
    """Return why something failed, on one line: the system's words, or the exception's, or at least its name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


@contextlib.contextmanager
def system_errors(kind: type[RepVGGError], doing: str, *others: type[Exception]) -> Iterator[None]:
    """Turn the system's errors inside the block, and `others`, into `kind`: "cannot read w.pth: Permission denied"."""
    try:
        yield
    except (OSError, *others) as error:
        raise kind(f"{doing}: {reason_of(error)}") from error
