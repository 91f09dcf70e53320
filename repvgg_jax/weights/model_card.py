"""Files that accompany a net's weights on the Hugging Face hub: the model card and timm's configuration."""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError, first_ten, shown
from ..net.variants import VARIANTS
from ..version import __version__
from .info import WeightsInfo
from .pretrained import PRETRAINED

LIBRARY = "repvgg-jax"
MARK = "<!-- push_to_hub writes this page anew for as long as this line is in it. -->"
TIMM_FILE = "timm.safetensors"
METRIC_TYPES = {"top1": "accuracy", "top5": "top-5 accuracy"}
"""Metric name -> the hub's metric type; any other metric's type is its name."""


def model_card(
    repository: str,
    info: WeightsInfo,
    *,
    license: str | None,
    metrics: Mapping[str, float],
    dataset: str | None,
    timm: bool,
) -> str:
    """Return the repository's README.md: metadata, a description of the net, and how to load it.

    Args:
      repository: owner and name.
      info: the weight file's description.
      license: licence of the weights, as the hub spells it.
      metrics: values by name.
      dataset: data set that the metrics were measured on.
      timm: whether the repository has a copy for timm.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name = repository.partition("/")[2]
    data_set = dataset or "unknown"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data_set,
            dataset_name=data_set,
            metric_type=METRIC_TYPES.get(metric, metric),
            metric_name=metric,
            metric_value=float(value),
        )
        for metric, value in metrics.items()
    ]
    card = ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag="image-classification",
        tags=["image-classification", "repvgg", "jax", "flax"] + (["timm"] if timm else []),
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    sections = [f"---\n{card.to_yaml().strip()}\n---", MARK, f"# {name}", _description(info), _loading(repository)]
    if metrics:
        rows = "\n".join(f"| {metric} | {float(value):.6g} |" for metric, value in metrics.items())
        sections.append(f"| {'on ' + dataset if dataset else 'metric'} | |\n|---|---|\n{rows}")
    if timm:
        loading = f'timm.create_model("hf-hub:{repository}", pretrained=True)'
        sections.append(f"`{TIMM_FILE}` holds the same weights for timm: `{loading}`.")
    sections.append(f"Written by repvgg-jax {__version__}.")
    return "\n\n".join(sections) + "\n"


def _description(info: WeightsInfo) -> str:
    images = info.preprocessing
    variant = info.variant.name if info.variant.name in VARIANTS else f"A custom RepVGG ({info.variant.name})"
    names = "" if info.class_names is None else f" ({first_ten(info.class_names)})"
    return (
        f"{variant}, {'deploy' if info.deploy else 'training'} form, {info.num_classes} classes{names}, "
        f"{info.num_parameters:,} parameters.\n"
        f"Images: {info.in_channels} channels, {images.image_size} pixels, centre crop {images.crop_fraction:g}, "
        f"mean {_numbers(images.mean)}, std {_numbers(images.std)} of pixel values in 0..1."
    )


def _loading(repository: str) -> str:
    return (
        "```python\n"
        "import repvgg_jax as rv\n\n"
        f"model, variables = rv.from_hub({json.dumps(repository)})\n"
        "predict = rv.make_predictor(model, variables, batch_size=1)  # images [N, H, W, C], normalised -> logits\n"
        "```"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def checked_metrics(metrics: Mapping[str, float] | None, dataset: str | None) -> dict[str, float]:
    """Return `metrics` as a dict.

    Raises:
      WeightsError: a metric is not a finite number, or a name cannot be shown in a table row.
    """
    for name, value in (metrics or {}).items():
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if not _fits_a_table(name) or not is_number:
            raise WeightsError(f"metrics must be names with finite numbers, not {shown(name)}: {value!r}")
    if dataset is not None and not _fits_a_table(dataset):
        raise WeightsError(f"dataset must be a name, not {shown(dataset)}")
    return dict(metrics or {})


def _fits_a_table(name: object) -> bool:
    return isinstance(name, str) and name.strip() != "" and name.isprintable() and "|" not in name


def timm_config(info: WeightsInfo) -> dict[str, Any]:
    """Return the `config.json` from which timm's `hf-hub:` loader builds the net and its preprocessing.

    Raises:
      WeightsError: timm cannot build this net, or it is in deploy form.
    """
    variant, images = info.variant, info.preprocessing
    row = PRETRAINED.get(variant.name)
    if row is None or variant != VARIANTS[variant.name]:
        why = "with non-default options" if row else "which is not one of its variants"
        raise WeightsError(f"timm=True: timm cannot build {variant.name}, {why}; it has {', '.join(PRETRAINED)}")
    if info.deploy:
        raise WeightsError("timm=True: timm's hf-hub: loader builds only the training form; pass that")
    size = [info.in_channels, images.image_size, images.image_size]
    config: dict[str, Any] = {
        "architecture": row.architecture,
        "num_classes": info.num_classes,
        "num_features": variant.widths[-1],
        "global_pool": "avg",
        "pretrained_cfg": {
            "hf_hub_filename": TIMM_FILE,
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": images.crop_fraction,
            "crop_mode": "center",
            "mean": list(images.mean),
            "std": list(images.std),
            "num_classes": info.num_classes,
            "pool_size": [-(-images.image_size // 32)] * 2,
            "first_conv": ["stem.conv_kxk.conv", "stem.conv_1x1.conv"],
            "classifier": "head.fc",
        },
    }
    if info.in_channels != 3:
        config["model_args"] = {"in_chans": info.in_channels}
    if info.class_names is not None:
        config["label_names"] = list(info.class_names)
    return config
