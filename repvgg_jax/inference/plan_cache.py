"""Cache of measured plans on disk.

Each plan is a JSON file, named after a digest of everything that the measurement depends on. A file is ignored if it
cannot be read, has the wrong content, or may have been written by another user.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jaxlib.version

from ..conv import native
from ..conv.algorithm import candidates
from ..errors import RepVGGError
from ..files import atomic_path
from ..machine import cache_folder, cores, cpu_model
from ..ownership import check_own_file, find_private_folder, make_private_folder
from ..version import __version__
from .plan import Plan, StagePlan, divisors

FORMAT = 2


def cache_key(plan: Plan, dtype: str) -> dict[str, Any]:
    """Return everything that a measurement depends on: device, versions, dtype, batch and the shape of every layer."""
    return {
        "format": FORMAT,
        "repvgg_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "device": device_name(),
        "native": native.available(),
        "dtype": dtype,
        "batch_size": plan.batch_size,
        "outer": plan.outer,
        "stages": [
            [[layer.name, *dataclasses.astuple(layer.shape)] for layer in stage.layers] for stage in plan.stages
        ],
    }


def load_plan(plan: Plan, dtype: str) -> Plan | None:
    """Return the cached measurement for the net, batch and machine of `plan`, or None."""
    key = cache_key(plan, dtype)
    try:
        path = find_private_folder(cache_folder("plans")) / _file_name(key)
        check_own_file(path)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != key:
            return None
        return _with_choices(plan, dtype, stored["portions"], stored["algorithms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save_plan(plan: Plan, dtype: str) -> bool:
    """Save a measured plan; return False if the file cannot be written or others could write to its folder."""
    key = cache_key(plan, dtype)
    stored = {"key": key, "portions": [stage.portion for stage in plan.stages], "algorithms": plan.algorithms()}
    try:
        path = make_private_folder(cache_folder("plans")) / _file_name(key)
        with atomic_path(path, mode=0o600) as temporary:
            temporary.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    except (OSError, RepVGGError):
        return False
    return True


def device_name() -> str:
    """Return the device kind; for a CPU, its model and the number of cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{cpu_model()}, {cores()} cores"


def _file_name(key: dict[str, Any]) -> str:
    return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def _with_choices(plan: Plan, dtype: str, portions: Any, algorithms: Any) -> Plan | None:
    """Return `plan` with the stored choices, or None if one of them is invalid."""
    if len(portions) != len(plan.stages):
        return None
    stages = []
    for stage, portion in zip(plan.stages, portions, strict=True):
        layers = []
        for layer in stage.layers:
            algorithm = algorithms[layer.name]
            if algorithm not in [candidate.name for candidate in candidates(layer.shape, dtype)]:
                return None
            layers.append(dataclasses.replace(layer, algorithm=algorithm))
        if type(portion) is not int or portion not in divisors(plan.outer):
            return None
        stages.append(StagePlan(portion, tuple(layers)))
    return dataclasses.replace(plan, stages=tuple(stages), source="cached measurement")
