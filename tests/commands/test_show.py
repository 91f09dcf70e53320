"""Claim: `show` writes one page that needs no network, says what is true of the net, and is not broken by any name."""

import dataclasses
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.net.summary import summarize
from repvgg_jax.predict import ImageReader
from repvgg_jax.preprocess import eval_transform, normalize
from repvgg_jax.show.collect import Request, collect, pseudo_random_images, short_names, stage_costs
from repvgg_jax.show.comparison import difference
from repvgg_jax.show.facts import Facts, Spread
from repvgg_jax.show.page import POLICY, page
from tests.helpers.commands import Done, command, error_of
from tests.helpers.outlier_nets import deploy_net, images
from tests.helpers.photos import PHOTO
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
    """Write a net of three classes."""
    model = rv.create_model(variant, 3)
    variables = random_variables(model, in_channels=in_channels)
    if deploy:
        model, variables = rv.to_deploy(model, variables)
    rv.save_weights(path, model, variables, class_names=NAMES)
    return path


@pytest.fixture
def weights(tmp_path) -> Path:
    """A training-form file."""
    return write_net(tmp_path / "small.safetensors", PLAIN)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    """Five photographs in two folders."""
    files = [tmp_path / "photos" / name for name in ("a/1.png", "a/2.jpg", "b/1.png", "b/2.png", "b/3.png")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        PHOTO.crop((40 * number, 20 * number, 40 * number + 90, 20 * number + 60)).save(file)
    return files


def facts_of(weights: Path, *paths: Path, batch_size: int = 16) -> Facts:
    info = rv.inspect_weights(weights)
    reader = ImageReader(tuple(map(str, paths)), info.preprocessing, 24) if paths else None
    return collect(Request(str(weights), info, {}, 5, batch_size, False), reader)


class Page(HTMLParser):
    """A page's elements and text; fails where tags are not balanced."""

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
    """Nothing is fetched, run or sent."""
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


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_kind_of_net_is_shown_layer_by_layer_with_its_own_ranges(name, photos, tmp_path):
    """Weights are compared with `to_deploy`'s, activations with the training form's features."""
    weights = write_net(tmp_path / "net.safetensors", VARIANTS[name])
    facts = facts_of(weights, *photos)
    (tmp_path / "net.html").write_text(page(facts), encoding="utf-8")
    check_page_of(VARIANTS[name], Page(tmp_path / "net.html"), len(photos))
    model, variables = rv.load_weights(weights)
    _, fused = rv.to_deploy(model, variables)
    assert [layer.name for layer in facts.weights] == [b.name for b in model.variant.blocks()] + ["linear"]
    for layer in facts.weights:
        tree = fused["params"][layer.name]
        kernel = np.asarray(tree["kernel"] if layer.name == "linear" else tree["rbr_reparam"]["kernel"])
        assert (layer.lowest, layer.highest, layer.shape) == (kernel.min(), kernel.max(), kernel.shape)
        ranges = np.array([np.abs(kernel[..., channel]).max() for channel in range(kernel.shape[-1])])
        check_spread(layer.spread, ranges)

    pixels = np.stack([eval_transform(Image.open(f).convert("RGB"), model_preprocessing(weights)) for f in photos])
    x = normalize(pixels, model_preprocessing(weights))
    outputs = jax.jit(lambda x: model.apply(variables, x, method="features"))(x)
    readers = {"stage1_0": "stage0", "stage2_0": "stage1", "stage4_0": "stage3", "pool": "stage4"}
    read = {reader: np.asarray(outputs[stage]) for reader, stage in readers.items()} | {"stage0": x}
    read["linear"] = read["pool"].mean((1, 2))
    inputs = {layer.name: layer for layer in facts.inputs}
    assert list(inputs) == [b.name for b in model.variant.blocks()] + ["pool", "linear"]
    for reader, values in read.items():
        layer = inputs[reader]
        np.testing.assert_allclose((layer.lowest, layer.highest), (values.min(), values.max()), rtol=1e-4, atol=1e-5)
        assert abs(layer.zeros - (values == 0).mean()) <= 2e-3
        exact = np.quantile(np.abs(values), 0.9999, method="inverted_cdf")
        assert exact * 0.999 <= layer.usual <= exact * 1.02
        check_spread(layer.spread, np.abs(values).reshape(-1, values.shape[-1]).max(0), 1e-4)


def check_page_of(variant: rv.Variant, page: Page, photos: int) -> None:
    """Every layer is there, and everything that is drawn is said too."""
    check_self_contained(page)
    for block in variant.blocks():
        rows = 4 if block.name == "stage0" else 3  # weights, activations and times; a stage of that name
        assert page.words.count(block.name) == rows, block.name
    assert len(page.all("img")) == photos
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == 6
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))


def model_preprocessing(weights: Path) -> rv.Preprocessing:
    return rv.inspect_weights(weights).preprocessing


def check_spread(spread: Spread, ranges: np.ndarray, tolerance: float = 1e-6) -> None:
    alive = ranges[ranges > 1e-6]
    assert (spread.channels, spread.dead) == (len(ranges), len(ranges) - len(alive))
    expected = (alive.min(), np.median(alive), alive.max(), alive.max() / np.median(alive))
    found = (spread.least, spread.median, spread.largest, spread.ratio)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-5)
    assert spread.outliers == (alive > 4 * np.median(alive)).sum()
    assert spread.vanishing == (alive < alive.max() / 254).sum()


def test_a_channel_that_one_scale_would_round_to_zero_is_counted():
    ranges = np.array([0.0, 0.1, 1.0, 1.0, 1.0, 1.2, 5.0, 30.0], np.float32)
    spread = Spread.of(ranges)
    assert (spread.channels, spread.dead, spread.outliers, spread.vanishing) == (8, 1, 2, 1)
    assert spread.largest_outliers == (5.0, 30.0)
    assert spread.ratio == 30
    scale = ranges.max() / 127
    assert [round(float(r / scale)) for r in ranges].count(0) == spread.dead + spread.vanishing


def test_the_forms_differ_by_rounding_and_no_more(weights, photos):
    direct, planned = facts_of(weights, *photos).differences
    for one in (direct, planned):
        assert one.expected == "training form"
        assert one.images == one.same_class == len(photos)
        assert 0 < one.relative < 1e-5
        assert 0 < one.largest < 1e-4


def test_a_difference_is_measured_as_the_page_says():
    expected = np.array([[1.0, 2.0, 2.0], [4.0, 0.0, 3.0]], np.float32)
    actual = np.array([[1.0, 2.0, 2.5], [4.0, 0.0, 2.0]], np.float32)
    one = difference(("a", "b"), expected, actual, "logits")
    assert (one.largest, one.relative, one.same_class) == (1.0, 0.2, 1)
    assert difference(("a", "b"), expected, actual, "embedding").same_class is None


def test_the_command_prints_the_pages_name(weights, photos, tmp_path):
    done = show(weights, photos[0].parents[1], "-o", tmp_path / "net.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'net.html'}\n", "")
    check_page_of(PLAIN, Page(tmp_path / "net.html"), len(photos))


def test_predictions_are_predicts(weights, photos, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ODD:
        (odd / name).write_bytes(photos[0].read_bytes())
    files = [*photos, *(odd / name for name in ODD)]
    done = command("repvgg_jax.__main__", "predict", weights, *files, "--format", "json", "-b", 4)
    answers = [json.loads(line)["predictions"] for line in done.stdout.splitlines()]
    shown = [
        [{"class": g.index, "name": g.name, "probability": float(f"{g.probability:.6g}")} for g in photo.guesses]
        for photo in facts_of(weights, *files, batch_size=4).photos
    ]
    assert shown == answers


def test_names_of_files_and_classes_are_text_and_nothing_else(weights, photos, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [*ODD, "line\nbreak.png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"caf\xe9.png"))
    for name in names:
        (folder / name).write_bytes(photos[0].read_bytes())
    done = show(weights, folder, "-o", tmp_path / "out.html")
    assert done.returncode == 0, done.stderr
    shown = Page(tmp_path / "out.html")
    check_self_contained(shown)
    for name in ODD:
        assert name in shown.words
        assert any(str(image["alt"]).startswith(f"{name}: ") for image in shown.all("img"))
    assert r"line\nbreak.png" in shown.words
    assert sys.platform != "linux" or r"caf\udce9.png" in shown.words
    assert NAMES[0] in shown.words
    assert r"a\x07b\u202ec" in shown.words


def test_without_images_the_page_says_so_and_is_the_same_every_time(weights, tmp_path):
    pages = []
    for name in ("one.html", "two.html"):
        assert show(weights, "--output", tmp_path / name).returncode == 0
        pages.append(Page(tmp_path / name))
    check_self_contained(pages[0])
    assert "No images were given: everything below was computed on 8 pseudo-random ones" in pages[0].text
    assert not pages[0].all("img")
    assert "Predictions" not in pages[0].text
    assert pages[0].source == pages[1].source
    noise = pseudo_random_images(8, 30, 4)
    assert noise.shape == (8, 30, 30, 4)
    assert abs(noise.std() - 1) < 0.1


def test_a_deploy_form_has_no_training_form_to_compare_with(photos, tmp_path):
    weights = write_net(tmp_path / "deploy.safetensors", PLAIN, deploy=True)
    assert show(weights, *photos, "-o", tmp_path / "out.html").returncode == 0
    shown = Page(tmp_path / "out.html")
    assert "This file holds the deploy form: it has no training form to compare with." in shown.text
    assert "training form" not in shown.text.replace("no training form", "").replace("the training form's blocks", "")
    (one,) = facts_of(weights, *photos).differences
    assert (one.expected, one.actual) == ("deploy form, direct convolutions", "deploy form, as planned")
    assert one.relative < 1e-5


def test_an_int8_file_is_shown_with_what_it_saturates(photos, tmp_path):
    model, variables = deploy_net("plain")
    preprocessing = rv.Preprocessing(SIZE, 1.0)
    net = rv.quantize(model, variables, images(), method="per-channel", preprocessing=preprocessing)
    weights = tmp_path / "int8.safetensors"
    rv.save_quantized(weights, net)
    facts = facts_of(weights, *photos)
    (tmp_path / "out.html").write_text(page(facts), encoding="utf-8")
    shown = Page(tmp_path / "out.html")
    check_self_contained(shown)
    assert "INT8 net: it has no training form to compare with" in shown.text
    assert "An INT8 net has no plan" in shown.text
    (one,) = facts.differences
    assert one.relative <= 1e-5, "all arithmetics give the same integers"
    for layer in facts.inputs:
        params = net.params[layer.name]
        largest = 127 if layer.name == "stage0" else 255
        assert layer.limit is not None
        np.testing.assert_allclose(layer.limit, largest * params["input_scale"], rtol=1e-6)
        assert layer.highest <= layer.limit * (1 + 1e-6)
    for layer in facts.weights:
        params = net.params[layer.name]
        real = np.float32(params["kernel"]) * params["kernel_scale"]
        np.testing.assert_allclose((layer.lowest, layer.highest), (real.min(), real.max()), rtol=1e-6)
    done = command("repvgg_jax.__main__", "predict", weights, *photos, "--format", "json")
    answers = [json.loads(line)["predictions"][0]["class"] for line in done.stdout.splitlines()]
    assert [photo.guesses[0].index for photo in facts.photos] == answers


def test_grey_images_and_channels_that_no_image_file_has(photos, tmp_path):
    grey = write_net(tmp_path / "grey.safetensors", PLAIN, in_channels=1)
    assert show(grey, *photos, "-o", tmp_path / "grey.html").returncode == 0
    assert len(Page(tmp_path / "grey.html").all("img")) == len(photos)
    six = write_net(tmp_path / "six.safetensors", PLAIN, in_channels=6)
    assert "takes 6 channels; image files have 1 or 3" in error_of(show(six, *photos, "-o", tmp_path / "six.html"))
    assert show(six, "-o", tmp_path / "six.html").returncode == 0
    assert "6 channels" in Page(tmp_path / "six.html").text


def test_a_net_without_a_classifier_is_compared_by_its_features(photos, tmp_path):
    import torch

    model = rv.create_model(dataclasses.replace(PLAIN, image_size=224), 3)
    rv.save_weights(tmp_path / "whole.pth", model, random_variables(model))
    state = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save({key: tensor for key, tensor in state.items() if "linear" not in key}, tmp_path / "body.pth")
    done = show(tmp_path / "body.pth", *photos, "--image-size", SIZE, "-o", tmp_path / "out.html")
    assert done.returncode == 0, done.stderr
    shown = Page(tmp_path / "out.html")
    check_self_contained(shown)
    assert "The file has no classifier: there is no prediction." in shown.text
    assert "Difference of pooled features" in shown.text
    assert "linear" not in shown.words
    assert "Same top class" not in shown.text


def test_more_images_than_wanted_are_taken_from_all_over_the_folder(weights, tmp_path):
    for folder in range(3):
        (tmp_path / "many" / f"{folder}").mkdir(parents=True)
        for number in range(4):
            PHOTO.crop((number, 0, number + 60, 60)).save(tmp_path / "many" / f"{folder}" / f"{number}.png")
    assert show(weights, tmp_path / "many", "--max-images", 3, "-o", tmp_path / "out.html").returncode == 0
    shown = Page(tmp_path / "out.html")
    assert [str(image["alt"]).split(":")[0] for image in shown.all("img")] == ["0/0.png", "1/0.png", "2/0.png"]
    assert "Computed on 3 images, spread evenly over the 12 that were given." in shown.text


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(weights, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    done = show(weights, photos[0], tmp_path / "broken.png", photos[1], "-o", tmp_path / "out.html")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'broken.png'}: cannot be read")
    assert done.stderr.count("\n") == 1
    shown = Page(tmp_path / "out.html")
    assert len(shown.all("img")) == 2
    assert "Computed on 2 images. 1 could not be read or computed." in shown.text


def test_outputs_that_are_not_finite_are_named_and_the_page_says_so(photos, tmp_path):
    model = rv.create_model(PLAIN, 3)
    variables = random_variables(model)
    variables["params"]["linear"]["kernel"] = np.full_like(variables["params"]["linear"]["kernel"], 3e38)
    rv.save_weights(tmp_path / "huge.safetensors", model, variables)
    done = show(tmp_path / "huge.safetensors", photos[0], photos[1], "-o", tmp_path / "out.html")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: {photos[0]}: the net's outputs are not finite numbers"
    shown = Page(tmp_path / "out.html")
    check_self_contained(shown)
    assert "there is nothing to compare" in shown.text
    assert [str(image["alt"]) for image in shown.all("img")] == ["1.png: no prediction", "2.jpg: no prediction"]


def test_times_are_the_cost_models_unless_measured(weights, tmp_path):
    assert show(weights, "-o", tmp_path / "out.html").returncode == 0
    text = Page(tmp_path / "out.html").text
    assert "Times are estimates of the cost model" in text
    assert "Layers, time estimated by the cost model" in text
    assert show(weights, "-o", tmp_path / "out.html", "--measure").returncode == 0
    text = Page(tmp_path / "out.html").text
    assert "Times were measured on" in text
    assert "Layers, time measured" in text
    assert "The whole net, measured on" in text
    plan = facts_of(weights).plan
    predictor = rv.make_predictor(*rv.load_weights(weights), batch_size=8, image_size=SIZE)
    assert {layer.name: layer.algorithm for layer in plan.layers} == predictor.plan.algorithms()  # type: ignore[union-attr]
    assert all(layer.seconds and layer.seconds > 0 for layer in plan.layers)


@pytest.mark.parametrize("name", rv.list_models())
def test_the_stages_add_up_to_the_summary(name):
    from repvgg_jax.net.variants import get_variant

    variant = get_variant(name)
    preprocessing = rv.Preprocessing(variant.image_size, variant.crop_fraction)
    info = rv.WeightsInfo("native", variant, True, 1000, 3, "float32", 0, preprocessing)
    whole, stages = summarize(variant, image_size=variant.image_size), stage_costs(info)
    for field in ("params", "train_params", "flops", "train_flops"):
        assert sum(getattr(stage, field) for stage in stages) == getattr(whole, field), field
    assert round(sum(stage.winograd_muls for stage in stages)) == whole.winograd_muls


def test_a_users_mistake_is_one_line_and_leaves_nothing(weights, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    flipped = tmp_path / "flipped.safetensors"
    content = bytearray(weights.read_bytes())
    content[-50] ^= 255
    flipped.write_bytes(content)
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    target = ("-o", out / "page.html")
    for words, arguments in {
        "cannot read": (damaged, *target),
        "CRC": (flipped, *target),
        "none.safetensors": (tmp_path / "none.safetensors", *target),
        "text.png: cannot be read as an image": (weights, tmp_path / "text.png", *target),
        "the name must end in .html or .htm": (weights, "-o", out / "page.txt"),
        "there is no folder": (weights, "-o", out / "none" / "page.html"),
        "--top must be at least 1, not 0": (weights, *target, "--top", 0),
        "--batch-size must be at least 1, not 0": (weights, *target, "--batch-size", 0),
        "--max-images must be at least 1, not -1": (weights, *target, "--max-images", -1),
        "--class-names gives 2 names for 3 classes": (weights, *target, "--class-names", "a", "b"),
    }.items():
        assert words in error_of(show(*arguments))
    assert list(out.iterdir()) == []


def test_a_page_takes_the_place_of_a_page_and_of_nothing_else(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "small.html"
    page.write_text("<h1>My own notes</h1>", encoding="utf-8")
    assert "small.html exists already, and is no page that show has written" in error_of(show(weights))
    assert page.read_text(encoding="utf-8") == "<h1>My own notes</h1>"
    page.unlink()
    for _ in range(2):
        done = show(weights)
        assert (done.returncode, done.stdout) == (0, "small.html\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.html", "small.safetensors"]


def test_folders_that_all_images_share_are_left_out():
    assert short_names(["/a/b/c/1.png", "/a/b/d/1.png"]) == ["c/1.png", "d/1.png"]
    assert short_names(["/a/b/1.png"]) == ["1.png"]
    assert short_names(["1.png", "a/2.png"]) == ["1.png", "a/2.png"]
    assert short_names(["a/1.png", "a/1.png"]) == ["1.png", "1.png"]
    assert short_names([]) == []


def test_colours_have_contrast_in_both_schemes():
    """WCAG 2.2: 4.5 for text, 3 for what charts are drawn with."""
    from importlib import resources

    style = resources.files("repvgg_jax.show").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part)) for part in style.split("@media")[:2])
    for colours in (light, dark):
        for text in ("ink", "soft", "link", "warn"):
            for ground in ("page", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["bar"], colours["page"]) >= 3
        assert contrast(colours["bar"], colours["panel"]) >= 3
        assert contrast(colours["ink"], colours["box"]) >= 3
        assert contrast(colours["bar"], colours["lost"]) >= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, brighter = sorted((luminance(one), luminance(other)))
    return (brighter + 0.05) / (darker + 0.05)
