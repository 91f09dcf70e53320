"""The complete page: one HTML file without scripts or external resources."""

from importlib import resources

from ..version import __version__
from . import layer_sections, sections
from .facts import Facts
from .markup import Markup, tag

GENERATOR = "repvgg_jax show"
"""Text that identifies a page written by `show`; it is in the first 1000 bytes."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: the browser loads nothing from outside the page."""


def page(facts: Facts) -> str:
    """Return the page that shows the facts, as HTML."""
    name = sections.net_name(facts.info)
    parts = {
        "predictions": sections.predictions(facts),
        "stages": sections.stages(facts),
        "forms": sections.forms(facts),
        "weights": layer_sections.weights(facts),
        "activations": layer_sections.activations(facts),
        "time": layer_sections.time(facts),
    }
    links = [tag("li", tag("a", sections.ANCHORS[anchor], href=f"#{anchor}")) for anchor, part in parts.items() if part]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}, {sections.form_name(facts.info)}"),
        tag("style", _style()),
    )
    header = tag(
        "header",
        tag("h1", tag("bdi", name), ", ", sections.form_name(facts.info)),
        sections.tiles(facts),
        sections.basis(facts),
        sections.file_facts(facts),
        tag("nav", tag("ul", links), aria_label="Sections"),
    )
    footer = tag("footer", sections.paragraph(f"Written by repvgg-jax {__version__}, python -m repvgg_jax show."))
    body = tag("body", header, tag("main", *parts.values()), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _style() -> Markup:
    return Markup(resources.files("repvgg_jax.show").joinpath("page.css").read_text(encoding="utf-8"))
