"""Claim: `show` writes one page that needs no network and that no name can break, or one line and no page."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.show.collect import pseudo_random_images, short_names
from repvgg_jax.show.markup import percent, scaled, significant
from tests.helpers.commands import error_of
from tests.helpers.photos import PHOTO
from tests.helpers.random_weights import random_variables
from tests.helpers.shown_nets import (
    NAMES,
    ODD,
    PLAIN,
    SIZE,
    Page,
    check_page_of,
    check_self_contained,
    facts_of,
    show,
    write_net,
)


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


def test_the_command_prints_the_path_of_the_page(weights, photos, tmp_path):
    done = show(weights, photos[0].parents[1], "-o", tmp_path / "net.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'net.html'}\n", "")
    check_page_of(PLAIN, Page(tmp_path / "net.html"), len(photos))


def test_file_and_class_names_are_escaped(weights, photos, tmp_path):
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


def test_without_images_the_page_says_so_and_is_reproducible(weights, tmp_path):
    pages = []
    for name in ("one.html", "two.html"):
        assert show(weights, "--output", tmp_path / name).returncode == 0
        pages.append(Page(tmp_path / name))
    check_self_contained(pages[0])
    assert "No images were given: everything below was computed on 8 pseudo-random images" in pages[0].text
    assert not pages[0].all("img")
    assert "Predictions" not in pages[0].text
    assert pages[0].source == pages[1].source
    noise = pseudo_random_images(8, 30, 4)
    assert noise.shape == (8, 30, 30, 4)
    assert abs(noise.std() - 1) < 0.1


def test_a_deploy_form_is_not_compared_with_a_training_form(photos, tmp_path):
    weights = write_net(tmp_path / "deploy.safetensors", PLAIN, deploy=True)
    assert show(weights, *photos, "-o", tmp_path / "out.html").returncode == 0
    shown = Page(tmp_path / "out.html")
    assert "This file contains the deploy form, so there is no training form to compare with." in shown.text
    assert "Training:" not in shown.text
    assert "training form" not in shown.text.replace("no training form", "")
    (one,) = facts_of(weights, *photos).differences
    assert one.expected == "deploy form with direct convolutions"
    assert one.actual == "deploy form with planned algorithms"
    assert one.relative < 1e-5


def test_nets_of_one_channel_and_of_six(photos, tmp_path):
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
    assert "The file has no classifier, so there are no predictions." in shown.text
    assert "Difference of pooled features" in shown.text
    assert "linear" not in shown.words
    assert "Same top class" not in shown.text


def test_max_images_takes_images_from_all_over_the_folder(weights, tmp_path):
    for folder in range(3):
        (tmp_path / "many" / f"{folder}").mkdir(parents=True)
        for number in range(4):
            PHOTO.crop((number, 0, number + 60, 60)).save(tmp_path / "many" / f"{folder}" / f"{number}.png")
    assert show(weights, tmp_path / "many", "--max-images", 3, "-o", tmp_path / "out.html").returncode == 0
    shown = Page(tmp_path / "out.html")
    assert [str(image["alt"]).split(":")[0] for image in shown.all("img")] == ["0/0.png", "1/0.png", "2/0.png"]
    assert "Computed on 3 images, sampled evenly from the 12 that were given." in shown.text


def test_an_unreadable_image_is_named_and_the_others_are_shown(weights, photos, tmp_path):
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
    assert "Times are estimates from the cost model" in text
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


def test_a_users_mistake_is_one_line_and_writes_nothing(weights, photos, tmp_path, monkeypatch):
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


def test_only_a_page_of_show_is_overwritten(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "small.html"
    page.write_text("<h1>My own notes</h1>", encoding="utf-8")
    assert "small.html exists already and was not written by show" in error_of(show(weights))
    assert page.read_text(encoding="utf-8") == "<h1>My own notes</h1>"
    page.unlink()
    for _ in range(2):
        done = show(weights)
        assert (done.returncode, done.stdout) == (0, "small.html\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.html", "small.safetensors"]


def test_folders_that_all_images_share_are_omitted():
    assert short_names(["/a/b/c/1.png", "/a/b/d/1.png"]) == ["c/1.png", "d/1.png"]
    assert short_names(["/a/b/1.png"]) == ["1.png"]
    assert short_names(["1.png", "a/2.png"]) == ["1.png", "a/2.png"]
    assert short_names(["a/1.png", "a/1.png"]) == ["1.png", "1.png"]
    assert short_names([]) == []


def test_colours_have_enough_contrast_in_both_schemes():
    """WCAG 2.2: 4.5 for text, 3 for graphics."""
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


def test_numbers_are_formatted_for_readers():
    values = (0, 0.25, 0.012345, 4.5, 999.6, 1234.5, 9_999_999, 1.2e-7, -3.14159, float("inf"), float("nan"))
    written = "0|0.250|0.0123|4.50|1,000|1,230|10,000,000|1.20e\u221207|\u22123.14|not finite|not finite"
    assert [significant(value) for value in values] == written.split("|")
    counts = (0, 39, 999, 1000, 8_305_640, 999_600, 1.36e9)
    assert [scaled(count) for count in counts] == [
        "0",
        "39",
        "999",
        "1.00\u00a0k",
        "8.31\u00a0M",
        "1.00\u00a0M",
        "1.36\u00a0G",
    ]
    shares = (0, 0.0001, 0.5, 0.99999, 1)
    assert [percent(share) for share in shares] == [
        f"{text}\u00a0%" for text in ("0.0", "<0.1", "50.0", ">99.9", "100.0")
    ]
