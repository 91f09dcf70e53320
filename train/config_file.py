"""A run's config.json: what it was started with, to which its resumption is held."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repvgg_jax.errors import ConfigError
from repvgg_jax.files import atomic_path

from .config import ClusterConfig, Config, RunConfig

# Options that may change between the start of a run and its resumption: none of them moves the weights. Whether the
# data are the same ones, in another place or not, is compared by `RunFacts`.
_FREE = {
    ("input", "data"),
    ("input", "data_dir"),
    ("input", "test_split"),
    ("input", "test_image_size"),
    ("input", "crop_fraction"),
    ("input", "workers"),
    ("input", "strict"),
    ("input", "prefetch"),
    *(("run", field.name) for field in dataclasses.fields(RunConfig) if field.name != "seed"),
    *(("cluster", field.name) for field in dataclasses.fields(ClusterConfig)),
}


def save_or_compare(config: Config, workdir: Path) -> None:
    """Write `workdir/config.json`, or hold `config` to the one a run there was started with.

    A run that has not come to its first checkpoint has nothing to resume, and gives way.

    Raises:
      ConfigError: an option that moves the weights has changed, or the file is damaged.
    """
    path = workdir / "config.json"
    current, default = _as_json(config), _as_json(Config())
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        try:
            earlier: Any = json.loads(path.read_text(encoding="utf-8"))
            # A run may be older than an option: it did what the option does by default.
            earlier = {group: values | earlier.get(group, {}) for group, values in default.items()}
            changes = [
                f"{name} {earlier[group][name]} -> {value}"
                for group, values in current.items()
                for name, value in values.items()
                if (group, name) not in _FREE and earlier[group][name] != value
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it or choose another --workdir") from error
        if changes:
            raise ConfigError(
                f"{workdir} holds a run with other options ({'; '.join(changes)}); choose another --workdir"
                + _how_to_go_on(workdir, changes)
            )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")


def _how_to_go_on(workdir: Path, changes: Sequence[str]) -> str:
    """What to do for more epochs: the schedule that the run has followed is of as many as it was started with."""
    if not any(change.startswith("epochs ") for change in changes):
        return ""
    return f", and to train this run's net further, once it is finished, give --init {workdir / 'final.safetensors'}"


def _as_json(config: Config) -> dict[str, Any]:
    """As `config.json` has it: lists, not tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
