"""A run's config.json: the options it was started with, which must not change when it resumes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from repvgg_jax.errors import ConfigError
from repvgg_jax.files import atomic_path
from repvgg_jax.paths import Place
from repvgg_jax.weights.architecture import MAX_BLOCKS
from repvgg_jax.weights.header import variant_from_json, variant_to_json

from .data.datasets import row_of
from .recipe import ClusterOptions, ModelOptions, Recipe, RunOptions

# Options that may change when a run resumes, because none of them affects the weights. `RunFacts` compares the data
# themselves, wherever they are stored.
_FREE = {
    ("input", "data"),
    ("input", "data_dir"),
    ("input", "test_split"),
    ("input", "test_image_size"),
    ("input", "crop_fraction"),
    ("input", "workers"),
    ("input", "worker_processes"),
    ("input", "strict"),
    ("input", "prefetch"),
    *(("run", field.name) for field in dataclasses.fields(RunOptions) if field.name != "seed"),
    *(("cluster", field.name) for field in dataclasses.fields(ClusterOptions)),
}

# Options of `run` that replace training, so no run is started with them.
_NO_RUN = ("preflight", "preflight_largest")

# Options that define the net. Several settings can define the same one, so the nets are compared instead.
_OF_THE_NET = [
    field.name
    for field in dataclasses.fields(ModelOptions)
    if field.name not in ("dtype", "remat", "dropout", "quantization")
]
_NET = "architecture"


def save_or_compare(recipe: Recipe, workdir: Place) -> None:
    """Write `workdir/config.json`, after comparing `recipe` with that of a run that was started there.

    A run without a checkpoint has nothing to resume, so its file is replaced without comparison.

    Raises:
      ConfigError: an option that affects the weights has changed, or the file is damaged or cannot be read.
    """
    path = workdir / "config.json"
    current = _as_json(recipe)
    try:
        begun = path.exists() and any(True for _ in (workdir / "checkpoints").glob("[0-9]*"))
        changes = _changes(json.loads(path.read_text(encoding="utf-8")), current) if begun else []
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it or choose another --workdir") from error
    if changes:
        raise ConfigError(
            f"{workdir} holds a run with other options ({'; '.join(changes)}); choose another --workdir"
            + _how_to_go_on(workdir, changes)
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")


def _changes(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe the options that affect the weights and differ; options missing from an older file had their default."""
    earlier = _settled({group: default | earlier.get(group, {}) for group, default in _fields(Recipe()).items()})
    changes = [
        f"{name} {value} -> {current[group][name]}"
        for group, values in earlier.items()
        for name, value in values.items()
        if (group, name) not in _FREE and name not in {*_OF_THE_NET, _NET} and value != current[group][name]
    ]
    before, now = earlier["model"], current["model"]
    net, other_net = _net(before), _net(now)
    if net != other_net and before["model"] != now["model"]:
        return [f"model {before['model']} -> {now['model']}", *changes]
    return [f"{name} {net[name]} -> {value}" for name, value in other_net.items() if net[name] != value] + changes


def _net(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the net that a file's model options define, without its name and evaluation settings."""
    if _NET in options:
        variant = variant_from_json({"variant": options[_NET]}, "config.json", MAX_BLOCKS, None)
    else:  # written before architectures could be read from files
        variant = ModelOptions(**{name: options[name] for name in _OF_THE_NET if name in options}).variant
    fields = dataclasses.asdict(variant)
    for name in ("name", "published", "image_size", "crop_fraction"):
        del fields[name]
    return fields | fields.pop("branches")


def _how_to_go_on(workdir: Place, changes: Sequence[str]) -> str:
    """Return advice for a changed --epochs: a schedule cannot be extended, but its weights can start another run."""
    if not any(change.startswith("epochs ") for change in changes):
        return ""
    return f", and to train this run's net further, once it is finished, give --init {workdir / 'final.safetensors'}"


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """Return the content of `config.json`, including values from the model's file and the data set's row."""
    fields = _settled(_fields(recipe))
    fields["model"][_NET] = variant_to_json(recipe.model.variant)
    return fields


def _fields(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a run as JSON types: lists, not tuples."""
    fields = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for name in _NO_RUN:
        del fields["run"][name]
    return fields


def _settled(fields: dict[str, Any]) -> dict[str, Any]:
    """Fill options that are not set with the values of the data set's row that affect the weights."""
    options, row = fields["input"], row_of(fields["input"]["data"])
    columns = {"image_size": row.train_size, "mean": row.mean, "std": row.std, "train_transform": row.train_transform}
    for name, value in columns.items():
        if options[name] is None:
            options[name] = list(value) if isinstance(value, tuple) else value
    return fields
