"""Small nets for the pages of `show`, and a parser for those pages."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import repvgg_jax as rv
from repvgg_jax.predict import ImageReader
from repvgg_jax.show.collect import Request, collect
from repvgg_jax.show.facts import Facts
from repvgg_jax.show.page import POLICY
from tests.helpers.commands import Done, command
from tests.helpers.random_weights import random_variables

SIZE = 32
PLAIN = rv.Variant((1, 2, 2, 1), (4, 6, 8, 8, 12), image_size=SIZE)
VARIANTS = {
    "plain": PLAIN,
    "grouped": dataclasses.replace(PLAIN, groups=2),
    "gates before ReLU": dataclasses.replace(PLAIN, squeeze_excite="before_relu", squeeze_excite_ratio=2),
    "gates after ReLU, auxiliary heads": dataclasses.replace(
        PLAIN, squeeze_excite="after_relu", squeeze_excite_ratio=2, auxiliary_heads=True
    ),
    "GELU": dataclasses.replace(PLAIN, activation="gelu"),
    "QARepVGG": dataclasses.replace(PLAIN, block="qarepvgg"),
}
NAMES = ('<b>bold</b> & "quoted"', "été 寺", "a\x07b\u202ec")
ODD = ["<img src=x onerror=alert(1)> & 'x'.png", '"onerror="x.png', "%20&lt;.png", "寺.png"]


def show(*arguments: object) -> Done:
    return command("repvgg_jax.__main__", "show", *arguments)


def write_net(path: Path, variant: rv.Variant, *, deploy: bool = False, in_channels: int = 3) -> Path:
    """Write a net with three classes."""
    model = rv.create_model(variant, 3)
    variables = random_variables(model, in_channels=in_channels)
    if deploy:
        model, variables = rv.to_deploy(model, variables)
    rv.save_weights(path, model, variables, class_names=NAMES)
    return path


def facts_of(weights: Path, *paths: Path, batch_size: int = 16) -> Facts:
    info = rv.inspect_weights(weights)
    reader = ImageReader(tuple(map(str, paths)), info.preprocessing, 24) if paths else None
    return collect(Request(str(weights), info, {}, 5, batch_size, False), reader)


class Page(HTMLParser):
    """A page's elements and text; fails if tags are not balanced."""

    VOID = ("meta", "img")

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_self_contained(page: Page) -> None:
    """Check that the page fetches, runs and sends nothing."""
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section", "div"}
    allowed |= {"h1", "h2", "p", "ul", "ol", "li", "dl", "dt", "dd", "a", "strong", "span", "bdi", "figure", "img"}
    allowed |= {"figcaption", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    allowed |= {"svg", "line", "rect", "circle", "text"}
    assert {tag for tag, _ in page.elements} <= allowed
    anchors = {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}, tag
        assert str(attributes.get("src", "data:")).startswith("data:"), tag
        assert attributes.get("href", "#stages") in anchors
        assert "style" not in attributes
    (style,) = re.findall("<style>(.*?)</style>", page.source, re.S)
    assert "url(" not in style
    assert "@import" not in style
    assert not re.findall(r"(?:https?:)?//\w", re.sub('base64,[^"]*"', "", page.source))
    assert any(meta.get("content", "") == POLICY for meta in page.all("meta"))


def check_page_of(variant: rv.Variant, page: Page, photos: int) -> None:
    """Check that every layer is listed, and that everything drawn is also given as text."""
    check_self_contained(page)
    for block in variant.blocks():
        rows = 4 if block.name == "stage0" else 3  # weights, activations and times; stage0 is also a stage's name
        assert page.words.count(block.name) == rows, block.name
    assert len(page.all("img")) == photos
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == 6
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
