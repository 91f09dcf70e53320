"""`--help` of the commands: what tyro prints, without the defaults, metavars and line breaks that confuse a reader.

The help text of an option that need not be set says what then applies, so `(default: None)` would contradict it.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

_NOTHING = ("None", "", "''")


def plain_help() -> ConstructorRegistry:
    """Return a registry for `tyro.cli` that shows `INT` for `int | None` and no default that is None or empty.

    It changes only the help: command lines are parsed as without it.
    """
    registry = ConstructorRegistry()
    active: list[Any] = []

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if active:  # called by the line below: the rules of tyro apply
            return None
        active.append(info)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            active.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return StructConstructorSpec(spec.instantiate, tuple(map(_with_plain_help, spec.fields)))

    return registry


def _with_plain_help(field: StructFieldSpec) -> StructFieldSpec:
    base, metadata = field.type, ()
    if get_origin(base) is Annotated:
        base, *metadata = get_args(base)
    plain: Any = tyro.conf.arg(metavar=_metavar(base), help_behavior_hint=_shown_default)
    annotated = _annotated(base, plain, *metadata)  # a field's own settings come later and win
    return dataclasses.replace(field, type=annotated, helptext=_one_paragraph(field.helptext))


def _annotated(base: Any, *metadata: Any) -> Any:
    return Annotated[(base, *metadata)]


def _one_paragraph(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Return a help text without the line breaks of the source."""

    def joined() -> str | None:
        whole = text() if callable(text) else text
        return whole and " ".join(whole.split())

    return joined


def _shown_default(label: str) -> str:
    return "" if label in _NOTHING else f"(default: {label})"


def _metavar(annotation: Any) -> str | None:
    """Return the metavar of `T | None` or of a tuple of any length; None for tyro's own."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _named(members[0]) if len(members) == 1 else None
    return _named(annotation) if get_origin(annotation) is tuple else None


def _named(member: Any) -> str | None:
    if member in (int, float, str):
        return member.__name__.upper()
    if get_origin(member) is Literal:
        return "{" + ",".join(map(str, get_args(member))) + "}"
    if get_origin(member) is tuple and get_args(member)[1:] == (...,):
        item = _named(get_args(member)[0])
        return item and f"{item} [{item} ...]"
    return None
