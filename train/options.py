"""An option of a run, declared in one place: its value, its limits and, as the string that follows it, its help."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from repvgg_jax.errors import ConfigError

Value = TypeVar("Value")
Limit = Callable[[str, Any], object]
"""Takes an option's name and value, and raises a ConfigError unless they go together."""

_LIMITS = "limits"


def option(default: Value, *limits: Limit) -> Value:
    """Return a dataclass field for an option with limits; `check_options` holds values to them."""
    return dataclasses.field(default=default, metadata={_LIMITS: limits})


def check_options(group: Any) -> None:
    """Hold every option of a dataclass to its limits. None, where an option may be left out, has none.

    Raises:
      ConfigError: names the option, its value and what it must be.
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
    """Return what a field is called on the command line."""
    return f"--{field.replace('_', '-')}"


def must(sentence: str, holds: Callable[[Any], bool]) -> Limit:
    """Return the limit that `OPTION must SENTENCE`."""

    def limit(name: str, value: Any) -> None:
        if not holds(value):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} must {sentence}, not {shown}")

    return limit


def at_least(least: float) -> Limit:
    """Return the limit of a number that must not be smaller."""
    return must(f"be at least {least}", lambda value: value >= least)


def at_most(most: float) -> Limit:
    """Return the limit of a number that must not be larger."""
    return must(f"be at most {most}", lambda value: value <= most)


def below(end: int) -> Limit:
    """Return the limit of a number that must be smaller."""
    shown = f"2^{end.bit_length() - 1}" if end > 2**32 else end
    return must(f"be below {shown}", lambda value: value < end)


def between(least: float, most: float) -> Limit:
    """Return the limit of a number, or of every number of several, that must lie in a range with both its ends."""

    def holds(value: Any) -> bool:
        return all(least <= number <= most for number in (value if isinstance(value, tuple) else (value,)))

    return must(f"lie between {least} and {most}", holds)


def one_of(choices: Collection[str]) -> Limit:
    """Return the limit of a name."""
    return must(f"be one of {', '.join(choices)}", lambda value: value in choices)
