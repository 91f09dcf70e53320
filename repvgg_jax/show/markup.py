"""HTML that no file's content can break: all text is escaped, except the tags created here."""

import math
import unicodedata
from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is already HTML."""


Content = str | Markup | None | Iterable["Content"]
"""Text, tags, nothing, or several of these."""

VOID = frozenset({"meta", "img", "line", "rect", "circle"})
"""Elements without contents. Those of SVG are self-closing, which HTML allows."""

DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""


def tag(name: str, /, *content: Content, **attributes: str | int | None) -> Markup:
    """Return an element. Attributes that are None are omitted, `_` in a name becomes `-`, and `class_` is `class`."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(visible(str(value)))}"')
    if name in VOID:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{joined(*content)}</{name}>")


def joined(*content: Content) -> Markup:
    """Return the concatenated contents."""
    return Markup("".join(map(_html, content)))


def _html(content: Content) -> str:
    if content is None:
        return ""
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return escape(visible(content))
    return joined(*content)


def visible(text: str) -> str:
    r"""Return a text with control characters, lone surrogates and direction changes as escapes (`\x00`)."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") or c in DIRECTIONS else c for c in text)


def clipped(text: str, length: int = 80) -> str:
    """Return a name, shortened to a maximum length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with this many significant digits, in a readable form: 0.0123, 4.56, 1,230, 1.2e-07."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", "\u2212")
    rounded = float(f"{value:.{digits}g}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{rounded:,.{decimals}f}".replace("-", "\u2212")


def scaled(value: float, unit: str = "") -> str:
    """Return a count; a large one with three digits and k, M or G: 8.31 M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{significant(value / factor)}\u00a0{letter}{unit}"
    return f"{round(value)}\u00a0{unit}".rstrip("\u00a0")


def percent(share: float) -> str:
    """Return a fraction in per cent with one decimal. Near 0 and 1 it is <0.1 % or >99.9 %, unless it is exact."""
    text = f"{100 * share:.1f}"
    if text == "0.0" and share > 0:
        text = "<0.1"
    if text == "100.0" and share < 1:
        text = ">99.9"
    return f"{text}\u00a0%"


def seconds(value: float) -> str:
    """Return a time in microseconds, milliseconds or seconds."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "\u00b5s")):
        if value >= 0.9995 * factor:
            return f"{significant(value / factor)}\u00a0{unit}"
    return f"{significant(value * 1e6)}\u00a0\u00b5s"


def counted(count: int, thing: str) -> str:
    """Return a count with its noun in the singular or plural: 1 image, 2 images."""
    return f"{count:,} {thing}{'s' * (count != 1)}"
