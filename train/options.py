"""Declaration of an option in one place: its default and limits; the string after the field is its help text."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from repvgg_jax.errors import ConfigError

Value = TypeVar("Value")
Limit = Callable[[str, Any], object]
"""Takes an option's name and value, and raises a ConfigError if the value is not allowed."""

_LIMITS = "limits"


def option(default: Value, *limits: Limit) -> Value:
    """Return a dataclass field for an option with limits, which `check_options` checks."""
    return dataclasses.field(default=default, metadata={_LIMITS: limits})


def check_options(group: Any) -> None:
    """Check every option of a dataclass against its limits; None (an option that is not set) passes.

    Raises:
      ConfigError: an option is invalid; the message names it, its value and the limit.
    """
    for field in dataclasses.fields(group):
        name, value = option_name(field.name), getattr(group, field.name)
        if value is None:
            continue
        for limit in field.metadata.get(_LIMITS, ()):
            limit(name, value)
        if value == math.inf:
            raise ConfigError(f"{name} must be finite, not {value}")


def option_name(field: str) -> str:
    """Return a field's name on the command line."""
    return f"--{field.replace('_', '-')}"


def must(sentence: str, holds: Callable[[Any], bool]) -> Limit:
    """Return a limit whose error message says that `OPTION must SENTENCE`."""

    def limit(name: str, value: Any) -> None:
        if not holds(value):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} must {sentence}, not {shown}")

    return limit


def at_least(least: float) -> Limit:
    """Return a limit that refuses numbers below `least`."""
    return must(f"be at least {least}", lambda value: value >= least)


def at_most(most: float) -> Limit:
    """Return a limit that refuses numbers above `most`."""
    return must(f"be at most {most}", lambda value: value <= most)


def below(end: int) -> Limit:
    """Return a limit that refuses numbers of `end` or more."""
    shown = f"2^{end.bit_length() - 1}" if end > 2**32 else end
    return must(f"be below {shown}", lambda value: value < end)


def between(least: float, most: float) -> Limit:
    """Return a limit that refuses numbers, one or several, outside of `least` to `most` (inclusive)."""

    def holds(value: Any) -> bool:
        return all(least <= number <= most for number in (value if isinstance(value, tuple) else (value,)))

    return must(f"lie between {least} and {most}", holds)


def one_of(choices: Collection[str]) -> Limit:
    """Return a limit that refuses names not among `choices`."""
    return must(f"be one of {', '.join(choices)}", lambda value: value in choices)
