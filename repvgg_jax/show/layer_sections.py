"""Sections of the page with one row per layer: weights, activations and time."""

import math
from collections.abc import Iterator

from .charts import LogAxis, bar_chart, range_chart
from .facts import OUTLIER, Facts, LayerInput, LayerTime, LayerWeights, Spread
from .markup import Content, Markup, counted, percent, scaled, seconds, significant, tag
from .sections import paragraph, section
from .tables import Column, Row, by_stage, table

HARD = 10.0
"""Ratio of largest to median channel range at or above which a layer is highlighted: at this ratio, a single scale
leaves 12 of 127 steps for the median channel."""


def weights(facts: Facts) -> Markup:
    """Return the section on weight ranges."""
    axis = LogAxis.over(size for layer in facts.weights for size in _sizes(layer.spread))
    columns = [
        Column("Layer", ""),
        Column(("Range of each output channel", axis.ticks()), "chart"),
        Column("Largest /\u00a0median"),
        Column("Outliers", hint=f"channels with more than {OUTLIER:g} times the median range"),
        Column("Lost with one\u00a0scale", hint="channels that become 0 in 8 bits if the layer has one scale"),
        Column("Lowest"),
        Column("Highest"),
        Column("Kernel", ""),
    ]

    def row(layer: LayerWeights) -> Row:
        spread = layer.spread
        return (
            layer.name,
            range_chart(spread, axis),
            _ratio(spread),
            _of(spread.outliers, spread.channels),
            _of(spread.vanishing, spread.channels),
            significant(layer.lowest),
            significant(layer.highest),
            "\u00d7".join(map(str, layer.shape)),
        )

    note = (
        "These are the weights of the deploy form, which quantisation stores in 8 bits. A channel's range is its "
        "largest absolute weight. With one scale per layer, the scale must cover the largest range, and channels in "
        "the shaded part of the row, below 1/254 of the largest range, become 0. With one scale per channel, no "
        "channel is lost."
    )
    if facts.info.quantized:
        note += " This net is already in 8 bits; its weights are shown multiplied by their scales."
    hardest = max(facts.weights, key=lambda layer: layer.spread.ratio)
    lost = sum(layer.spread.vanishing for layer in facts.weights)
    lossy = sum(layer.spread.vanishing > 0 for layer in facts.weights)
    losses = f"{counted(lost, 'channel')} in {counted(lossy, 'layer')}" if lost else "no channel"
    finding = (
        f"The hardest layer to quantise is {hardest.name}: the largest range of its channels is "
        f"{significant(hardest.spread.ratio)} times the median range. With one scale per layer, {losses} would be lost."
    )
    rows = {layer.name: row(layer) for layer in facts.weights}
    return section(
        "weights",
        paragraph(note),
        paragraph(tag("strong", finding)),
        _legend(vanishing=True),
        table("Weight ranges by layer", columns, by_stage(facts.stages, rows)),
    )


def activations(facts: Facts) -> Markup:
    """Return the section on the ranges of the layers' inputs."""
    axis = LogAxis.over(size for layer in facts.inputs for size in (*_sizes(layer.spread), layer.usual))
    limited = any(layer.limit is not None for layer in facts.inputs)
    columns = [
        Column("Input of", ""),
        Column(("Range of each channel", axis.ticks()), "chart"),
        Column("Largest /\u00a0median"),
        Column(
            "Largest /\u00a0percentile",
            hint="largest absolute value divided by the 99.99th percentile of absolute values",
        ),
        Column("99.99th percentile", hint="of absolute values"),
        *([Column("Saturates at"), Column("Saturated")] if limited else []),
        Column("Lowest"),
        Column("Highest"),
        Column("Zeros"),
        Column("Outliers", hint=f"channels with more than {OUTLIER:g} times the median range"),
    ]

    def row(layer: LayerInput) -> Row:
        limit: list[Content] = []
        if limited:
            is_float = layer.limit is None
            limit = ["float", ""] if is_float else [significant(layer.limit or 0), percent(layer.saturated)]
        return (
            layer.name,
            range_chart(layer.spread, axis, layer.usual, vanishing=False),
            _ratio(layer.spread),
            significant(layer.largest / layer.usual) if layer.usual else "",
            significant(layer.usual),
            *limit,
            significant(layer.lowest),
            significant(layer.highest),
            percent(layer.zeros),
            _of(layer.spread.outliers, layer.spread.channels),
        )

    images = "pseudo-random images" if facts.pseudo_random else "images"
    note = (
        f"These are the inputs of each layer for the {images}. The input of stage0 is the normalised image, that of "
        "pool is the output of the last block, and that of linear is the pooled features. All channels of an "
        "activation share one scale. If the largest value is far above the 99.99th percentile, it is better to let it "
        "saturate."
    )
    dead = sum(layer.spread.dead for layer in facts.inputs)
    channels = sum(layer.spread.channels for layer in facts.inputs)
    silent = f"{dead:,} of {counted(channels, 'channel')} {'was' if dead == 1 else 'were'} 0 everywhere."
    rows = {layer.name: row(layer) for layer in facts.inputs}
    return section(
        "activations",
        paragraph(note),
        paragraph(tag("strong", silent)) if dead else None,
        _legend(vanishing=False),
        table("Activation ranges by layer", columns, by_stage(facts.stages, rows)),
    )


def _sizes(spread: Spread) -> Iterator[float]:
    yield from (spread.least, spread.largest)


def _ratio(spread: Spread) -> Content:
    text = significant(spread.ratio)
    hard = math.isfinite(spread.ratio) and spread.ratio >= HARD
    return tag("strong", text, class_="hard") if hard else text


def _of(count: int, channels: int) -> str:
    return f"{count:,} of {channels:,}" if count else "0"


def _legend(*, vanishing: bool) -> Markup:
    example = Spread(9, 0, 0.02, 0.06, 0.12, 0.25, 6.0, 1, (6.0,), 0)
    axis = LogAxis.over((0.01, 10))
    key = range_chart(example, axis, None if vanishing else 2.0, vanishing=vanishing)
    parts = f"line: minimum to {OUTLIER:g} times the median; box: middle half; bar: median; dots: beyond the line"
    mark = "shaded: lost with one scale" if vanishing else "dashed: 99.99th percentile"
    return tag("p", tag("span", key, class_="key"), f"{parts}; {mark}.", class_="legend")


def time(facts: Facts) -> Markup:
    """Return the section on the algorithm and time of each layer."""
    plan = facts.plan
    content: list[Content] = []
    if plan.source is None:
        content.append(
            paragraph("An INT8 net has no plan: all layers use the same algorithm, and there are no time estimates.")
        )
    else:
        by = {"cost model": "the cost model", "measured": "measurements"}.get(plan.source, plan.source)
        content.append(
            paragraph(f"Algorithms for batches of {plan.batch_size}, chosen by {by}. ", _source_of_times(facts))
        )
    if plan.net_seconds is not None:
        measured = f"{seconds(plan.net_seconds)} per image, in batches of {plan.batch_size}"
        content.append(paragraph(tag("strong", f"The whole net, measured on {plan.device}: {measured}.")))
    if plan.layers:
        content.append(_layer_times(facts))
    return section("time", content)


def _source_of_times(facts: Facts) -> str:
    if facts.plan.times_from == "cost model":
        return (
            "Times are estimates from the cost model, which was fitted on two cores of a 2.3 GHz AVX-512 server. On "
            "this machine, the shares are meaningful, but the absolute times are not. Use show --measure to measure "
            "them instead."
        )
    if facts.plan.times_from == "measurement":
        return f"Times were measured on {facts.plan.device}: only the convolutions, and each kind of layer separately."
    return f"There are no times for individual layers: the cost model is for CPUs, and this is {facts.plan.device}."


def _layer_times(facts: Facts) -> Markup:
    layers = facts.plan.layers
    times = [layer.seconds for layer in layers if layer.seconds is not None]
    whole = sum(times)
    columns = [Column("Layer", "")]
    columns += [Column("Time", "chart"), Column("Per image"), Column("Share")] if times else []
    columns += [Column("Algorithm", ""), Column("Multiplications")]

    def row(layer: LayerTime) -> Row:
        timed: list[Content] = []
        if layer.seconds is not None:
            share, largest = layer.seconds / whole, layer.seconds / max(times)
            timed = [bar_chart(largest, percent(share)), seconds(layer.seconds), percent(share)]
        return (layer.name, *timed, layer.algorithm.replace("_", " "), scaled(layer.multiplications))

    bodies = by_stage(facts.stages, {layer.name: row(layer) for layer in layers})
    sums: Row = (
        "all layers",
        *(["", seconds(whole), ""] if times else []),
        "",
        scaled(sum(x.multiplications for x in layers)),
    )
    kind = {"cost model": "estimated by the cost model", "measurement": "measured"}
    caption = f"Layers, time {kind[facts.plan.times_from]}" if facts.plan.times_from else "Layers and their algorithms"
    return table(caption, columns, [*bodies, (None, [sums])])
