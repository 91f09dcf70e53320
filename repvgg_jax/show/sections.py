"""Sections of the page about the file, its images and its forms."""

import base64

from ..net.kernel_algebra import BN_EPSILON
from ..net.variants import Variant
from ..weights import WeightsInfo
from .charts import bar_chart
from .collect import TRAINING
from .facts import Facts, Photo, StageCost
from .markup import Content, Markup, clipped, counted, joined, percent, scaled, significant, tag
from .tables import Column, Row, table

ANCHORS = {
    "predictions": "Predictions",
    "stages": "Stages and costs",
    "forms": "Training and deploy form",
    "weights": "Weight ranges",
    "activations": "Activation ranges",
    "time": "Time per layer",
}
"""Ids and headings of the sections, in order."""


def section(anchor: str, *content: Content) -> Markup:
    """Return a section with its heading."""
    return tag("section", tag("h2", ANCHORS[anchor]), *content, id=anchor)


def paragraph(*content: Content) -> Markup:
    """Return a paragraph."""
    return tag("p", *content)


def total(stages: tuple[StageCost, ...], field: str) -> float:
    """Return the sum of one field over all stages."""
    return sum(getattr(stage, field) for stage in stages)


def net_name(info: WeightsInfo) -> str:
    """Return the name of the net."""
    return "Custom RepVGG" if info.variant.name == Variant.name else clipped(info.variant.name)


def form_name(info: WeightsInfo) -> str:
    """Return the name of the form that a file contains."""
    return "INT8 deploy form" if info.quantized else "deploy form" if info.deploy else "training form"


def file_facts(facts: Facts) -> Markup:
    """Return the description of the file as a list of terms."""
    info, images = facts.info, facts.info.preprocessing
    mean, std = (", ".join(f"{number:.6g}" for number in numbers) for numbers in (images.mean, images.std))
    names = ", ".join(clipped(name, 40) for name in (info.class_names or ())[:10])
    more = len(info.class_names or ()) - 10
    classes = counted(info.num_classes, "class").replace("classs", "classes") if info.num_classes else "no classifier"
    variant = info.variant
    epsilon = f", BatchNorm epsilon {variant.epsilon:g}" if variant.epsilon != BN_EPSILON and not info.deploy else ""
    terms: dict[str, Content] = {
        "File": tag("bdi", facts.file),
        "Form": f"{form_name(info)}, {info.family} names, {info.dtype}, {info.num_parameters:,} parameters{epsilon}",
        "Net": (
            tag("bdi", net_name(info)),
            f": blocks {_numbers(variant.num_blocks)}; widths {_numbers(variant.widths)}; "
            f"strides {_numbers(variant.strides)}; groups {variant.groups}",
            f"; squeeze-and-excite {variant.squeeze_excite.replace('_', ' ')}" if variant.squeeze_excite else None,
            "; QARepVGG blocks" if variant.block == "qarepvgg" else None,
            f"; {variant.activation}" if variant.activation != "relu" else None,
        ),
        "Images": f"{images.image_size}\u00d7{images.image_size} pixels, {counted(info.in_channels, 'channel')}: "
        f"shorter side resized to {images.resize_size}, then centre crop (crop fraction {images.crop_fraction:g}); "
        f"mean {mean}, std {std} for pixel values in 0..1",
        "Classes": (classes, ": " if names else None, names, f", and {more:,} more" if more > 0 else None),
    }
    return tag("dl", [(tag("dt", term), tag("dd", text)) for term, text in terms.items()], class_="facts")


def _numbers(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def tiles(facts: Facts) -> Markup:
    """Return the key figures."""
    hardest = max(facts.weights, key=lambda layer: layer.spread.ratio)
    figures: list[tuple[str, str]] = [
        (scaled(total(facts.stages, "params")), "parameters, deploy form"),
        (scaled(total(facts.stages, "flops")), "multiply-adds per image"),
        (significant(hardest.spread.ratio), f"largest / median channel range of weights, {hardest.name}"),
    ]
    if facts.differences:
        last = facts.differences[-1]
        compared = f"{last.expected} and {last.actual}"
        figures.append((significant(last.relative, 2), f"relative difference between {compared}"))
    items = [tag("li", tag("strong", figure), tag("span", label)) for figure, label in figures]
    return tag("ul", items, class_="tiles")


def basis(facts: Facts) -> Markup:
    """Return a paragraph on the images used for all results."""
    if facts.pseudo_random:
        return paragraph(
            f"No images were given: everything below was computed on {facts.images} pseudo-random images (smooth "
            "noise, the same every time). Activation ranges on photographs differ from these.",
        )
    text = f"Computed on {counted(facts.images, 'image')}"
    if facts.listed:
        text += f", sampled evenly from the {facts.listed:,} that were given"
    unusable = f" {facts.unusable:,} could not be read or computed." if facts.unusable else ""
    return paragraph(f"{text}.{unusable}")


def predictions(facts: Facts) -> Markup | None:
    """Return the photographs with their most likely classes; None without photographs."""
    if not facts.photos:
        return None
    note = "Each image as the net sees it, resized and cropped, with its most likely classes."
    if not facts.info.num_classes:
        note = (
            "Each image as the net sees it, resized and cropped. The file has no classifier, so there are no "
            "predictions."
        )
    return section("predictions", paragraph(note), tag("div", map(_figure, facts.photos), class_="photos"))


def _figure(photo: Photo) -> Markup:
    lines = []
    for guess in photo.guesses:
        name = clipped(guess.name or f"class {guess.index}")
        share = percent(guess.probability)
        bar = bar_chart(guess.probability, f"{name}: {share}")
        lines.append(tag("li", tag("bdi", name, class_="name"), tag("span", share, class_="share"), bar))
    described = f"{clipped(photo.name)}: "
    if photo.guesses:
        first = photo.guesses[0]
        described += f"{clipped(first.name or f'class {first.index}')}, {percent(first.probability)}"
    else:
        described += "no prediction"
    source = f"data:image/jpeg;base64,{base64.b64encode(photo.jpeg).decode()}"
    picture = tag("img", src=source, alt=described)
    caption = tag("figcaption", tag("bdi", clipped(photo.name)), tag("ol", lines) if lines else None)
    return tag("figure", picture, caption)


def stages(facts: Facts) -> Markup:
    """Return the table of stages. A deploy form has no columns on training: its training branches are unknown."""
    both = not facts.info.deploy
    columns = [
        Column("Stage", ""),
        Column("Blocks"),
        Column("Pixels per side"),
        Column("Channels"),
        Column("Parameters"),
        Column("Multiply-adds"),
        Column("Share of multiply-adds", "chart"),
        Column("Share"),
        Column("Winograd", hint="multiplications that remain with F(2x2, 3x3) where the stride is 1"),
        *([Column("Training: parameters"), Column("Training: multiply-adds")] if both else []),
    ]
    whole = total(facts.stages, "flops")

    def row(stage: StageCost) -> Row:
        pixels = f"{stage.in_size} \u2192 {stage.out_size}" if stage.blocks else ""
        groups = f" in {stage.groups} groups" if stage.groups > 1 else ""
        return (
            {"linear": "classifier"}.get(stage.name, stage.name),
            str(len(stage.blocks)) if stage.blocks else "",
            pixels,
            f"{stage.channels:,}{groups}",
            scaled(stage.params),
            scaled(stage.flops),
            bar_chart(stage.flops / whole, percent(stage.flops / whole)),
            percent(stage.flops / whole),
            scaled(stage.winograd_muls),
            *((scaled(stage.train_params), scaled(stage.train_flops)) if both else ()),
        )

    blocks = sum(len(stage.blocks) for stage in facts.stages)
    sums = [scaled(total(facts.stages, field)) for field in ("params", "flops", "winograd_muls")]
    training = [scaled(total(facts.stages, field)) for field in ("train_params", "train_flops") if both]
    last: Row = ("whole\u00a0net", str(blocks), "", "", *sums[:2], "", "", sums[2], *training)
    bodies = [(None, [row(stage) for stage in facts.stages]), (None, [last])]
    note = (
        "Costs are for one image in the deploy form, a plain stack of 3\u00d73 convolutions, one per block. "
        "Multiply-adds are counted as in the paper. Winograd: multiplications that remain with F(2\u00d72, 3\u00d73) "
        "where the stride is 1."
    )
    return section("stages", paragraph(note), table("Cost per stage", columns, bodies))


def forms(facts: Facts) -> Markup:
    """Return the section that compares both forms, and the differences between their outputs."""
    info = facts.info
    content: list[Content] = []
    if info.quantized:
        content.append(paragraph("This file contains an INT8 net, so there is no training form to compare with."))
    elif info.deploy:
        content.append(paragraph("This file contains the deploy form, so there is no training form to compare with."))
    else:
        content.append(_side_by_side(facts))
    if facts.differences:
        content.append(_differences(facts))
    else:
        content.append(paragraph("No image has finite outputs in all computations, so there is nothing to compare."))
    return section("forms", content)


def _side_by_side(facts: Facts) -> Markup:
    variant = facts.info.variant
    names = dict.fromkeys(b.name for block in variant.blocks() for b in variant.training_branches(block))
    columns = [Column("", ""), Column("Training form", ""), Column("Deploy form", "")]
    params = [total(facts.stages, field) for field in ("train_params", "params")]
    flops = [total(facts.stages, field) for field in ("train_flops", "flops")]
    rows: list[Row] = [
        ("each block computes", f"the sum of {', '.join(names)}", "one 3\u00d73 convolution with bias"),
        ("parameters", *map(scaled, params)),
        ("multiply-adds per image", *map(scaled, flops)),
        ("parameters in float32", *(scaled(4 * count, "B") for count in params)),
    ]
    return table("Both forms", columns, [(None, rows)])


def _differences(facts: Facts) -> Markup:
    columns = [
        Column("Compared", ""),
        Column("with", ""),
        Column("Largest absolute difference"),
        Column("Largest relative difference"),
    ]
    classes = facts.differences[0].same_class is not None
    columns += [Column("Same top class")] if classes else []
    rows: list[Row] = []
    for one in facts.differences:
        agreeing = [f"{one.same_class} of {one.images}"] if classes else []
        rows.append((one.actual, one.expected, significant(one.largest), significant(one.relative), *agreeing))
    outputs = "logits" if classes else "pooled features"
    images = counted(facts.differences[0].images, "pseudo-random image" if facts.pseudo_random else "image")
    note = (
        f"Measured on {images}: the largest absolute difference of any single output, and the largest relative "
        f"difference of any image's {outputs}, \u2016difference\u2016 / \u2016{outputs}\u2016. "
    )
    exact = facts.differences[0].expected == TRAINING
    why = "Fusion is exact; the differences are rounding errors." if exact else None
    return joined(paragraph(note, why), table(f"Difference of {outputs}", columns, [(None, rows)]))
