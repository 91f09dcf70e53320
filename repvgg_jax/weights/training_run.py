"""Checkpoints of a training run, read like weight files: `runs/x` for the best, `runs/x/checkpoints/6` for one.

They are orbax checkpoints, as written by `train/checkpoint.py`: an item `state` with the arrays, and an item `facts`,
JSON with a description of the net (as in a native file's header), the arrays' shapes, and their common CRC-32.
"""

import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import WeightsError, reason_of, shown
from ..paths import Place
from ..storage import BucketPath
from ..trees import flatten
from .header import refusing_damage
from .native import HEADER
from .tensor_file import Tensor, TensorFile, contiguous_strides

Folder = TypeVar("Folder", Path, BucketPath)

METRIC = "top1"
STATE, FACTS = "state", "facts/metadata"
MARKER = "commit_success.txt"
"""The file that orbax writes last. In a bucket, where nothing is renamed, a checkpoint without it is incomplete."""
MAX_FACTS_BYTES = 64 << 20
AVERAGED = "batch_stats"
"""The collection that each device has a copy of; the net's is the average over devices."""

GRACE_SECONDS = 0.2
"""Seconds to wait for tensorstore's pending operations to fail after orbax has raised the first error."""

COLLECTIONS = {
    False: {"params": "params", AVERAGED: AVERAGED},
    True: {"ema_params": "params", f"ema_{AVERAGED}": AVERAGED},
}
"""Moving average or not -> the state's fields -> their collections in a net's variables."""

QAT_RANGE = "input_range"
"""Leaf that quantisation-aware training keeps next to the BN statistics; float nets do not have it."""


def find_checkpoint(folder: Folder) -> tuple[Folder, str | None]:
    """Return `folder` if it is a checkpoint, else the best checkpoint in it, and a note for the user on the choice.

    Args:
      folder: a run's folder, its `checkpoints` folder, or a single checkpoint.

    Raises:
      WeightsError: there is no checkpoint.
    """
    if _is_complete(folder):
        return folder, None
    inner = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = complete_steps(inner)
    if not steps:
        if (folder / "saved_model.pb").is_file():
            raise WeightsError(f"{folder} is a SavedModel, an export for TensorFlow, not weights")
        raise WeightsError(f"{folder} is a folder, not a weight file, and holds no checkpoints of a training run")
    evaluated = {step: top1 for step, top1 in evaluations(inner).items() if step in steps}
    if not evaluated:
        return inner / str(steps[-1]), f"{folder}: took checkpoint {steps[-1]}, the newest; none has been evaluated"
    top1, best = max((top1, step) for step, top1 in evaluated.items())
    note = f"{folder}: took checkpoint {best}, the best of {len(steps)}, with top-1 {100 * top1:.2f} %"
    return inner / str(best), note


def complete_steps(checkpoints: Place) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first."""
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal() and _is_complete(path))


def _is_complete(checkpoint: Place) -> bool:
    return (checkpoint / (MARKER if isinstance(checkpoint, BucketPath) else FACTS)).is_file()


def evaluations(checkpoints: Place) -> dict[int, float]:
    """Return top-1 by step of a run's evaluated checkpoints: the better of the weights and their moving average.

    It is read from orbax's metrics in the checkpoint or, for checkpoints of earlier versions and if that file is
    damaged, from the run's metrics.jsonl.
    """
    best_top1: dict[int, float] = {}
    absent = FileNotFoundError if isinstance(checkpoints, BucketPath) else OSError  # a bucket's errors may be temporary
    with contextlib.suppress(absent):
        for line in (checkpoints.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a line cut short by a crash
                row = json.loads(line)
                if row.get("form") in ("train", "ema"):
                    best_top1[row["step"]] = max(float(row[METRIC]), best_top1.get(row["step"], 0.0))
    for path in checkpoints.glob("*/metrics/metrics"):
        with contextlib.suppress(absent, ValueError, KeyError, TypeError):
            best_top1[int(path.parent.parent.name)] = float(json.loads(path.read_text(encoding="utf-8"))[METRIC])
    return best_top1


def read_checkpoint(handle: io.FileIO, folder: Path, ema: bool) -> TensorFile:
    """Return a checkpoint as a native file in training form, whose arrays are all read on the first access.

    Args:
      handle: the checkpoint's open `FACTS` file.
      folder: the checkpoint.
      ema: return the moving average of the weights.

    Raises:
      WeightsError: the checkpoint is damaged, has no moving average, or is of a release that did not describe the net.
    """
    with refusing_damage(f"cannot read {folder}: damaged checkpoint"):
        handle.seek(0)
        facts = json.loads(handle.read(MAX_FACTS_BYTES))
        net = facts["facts"].get("net")
        shapes = {_name(key): tuple(map(int, shape)) for key, shape in facts["shapes"].items()}
        crc32 = int(facts["crc32"])
    if not net:
        raise WeightsError(
            f"{folder} does not say which net it is, as checkpoints of this release do: start its training command "
            "again, which writes final.safetensors at the end"
        )
    places = _places(shapes, ema)
    if not places:
        raise WeightsError(f"{folder} has no moving average (EMA) of the weights: --ema-decay keeps one")
    tensors = {}
    for number, (name, place) in enumerate(places.items()):
        shape = shapes[place][1:] if _is_averaged(place) else shapes[place]
        tensors[name] = Tensor(shape, np.dtype("float32"), number, contiguous_strides(shape))
    step = {"num_batches_tracked": int(folder.name)} if folder.name.isdecimal() else {}
    metadata = {HEADER: json.dumps(net | step)}
    state = list(places.values())
    return _CheckpointFile(folder, handle, tensors, metadata, shapes=shapes, crc32=crc32, places=state)


def _name(key: str) -> str:
    """Return JAX's path `['params']['linear']['bias']` as `params/linear/bias`."""
    return "/".join(re.findall(r"\['([^']*)'\]", key))


def _key(name: str) -> str:
    """Invert `_name`."""
    return "".join(f"['{part}']" for part in name.split("/"))


def _places(shapes: Mapping[str, Any], ema: bool) -> dict[str, str]:
    """Return a mapping from names in a net's variables to names in the state."""
    places = {}
    for name in shapes:
        field, _, rest = name.partition("/")
        if field in COLLECTIONS[ema] and not rest.endswith(f"/{QAT_RANGE}"):
            places[f"{COLLECTIONS[ema][field]}/{rest}"] = name
    return places


def _is_averaged(place: str) -> bool:
    return place.partition("/")[0].endswith(AVERAGED)


@dataclasses.dataclass(kw_only=True)
class _CheckpointFile(TensorFile):
    """A checkpoint whose arrays are all read on the first access. A tensor's `offset` is its index.

    Attributes:
      shapes: shapes of the state's arrays, by name.
      crc32: CRC-32 of all arrays.
      places: each tensor's name in the state.
    """

    shapes: Mapping[str, tuple[int, ...]]
    crc32: int
    places: list[str]
    _arrays: list[np.ndarray] = dataclasses.field(default_factory=list)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's values; see `TensorFile.read`."""
        with self._lock:
            if not self._arrays:
                state = _restore(self.path, self.shapes, self.crc32)
                self._arrays = [state[p].mean(0) if _is_averaged(p) else state[p] for p in self.places]
        return self._arrays[tensor.offset]


def _restore(folder: Path, shapes: Mapping[str, tuple[int, ...]], crc32: int) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint by name, after comparing their shapes and CRC-32 with those saved.

    Raises:
      WeightsError: orbax is not installed, cannot read the arrays, or they differ from those saved.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise WeightsError(
            f"reading the training checkpoint {folder} needs orbax-checkpoint: pip install orbax-checkpoint"
        ) from error
    with without_late_failures():
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.restore((folder / STATE).absolute())
            leaves = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
        except Exception as error:  # orbax and tensorstore report damage with all kinds of exceptions
            time.sleep(GRACE_SECONDS)
            raise WeightsError(f"cannot read {folder}: damaged checkpoint ({shown(reason_of(error))})") from error
    same_shapes = {name: leaf.shape for name, leaf in leaves.items()} == dict(shapes)
    if not same_shapes or checksum({_key(name): leaf for name, leaf in leaves.items()}) != crc32:
        raise WeightsError(f"cannot read {folder}: damaged checkpoint (its contents are not what was saved)")
    return leaves


@contextlib.contextmanager
def without_late_failures() -> Iterator[None]:
    """Suppress reports of tensorstore operations that fail after orbax has raised the first error."""
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def of_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.addFilter(_is_of_others)
    sys.unraisablehook = of_others
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(_is_of_others)


def _is_of_others(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("orbax" in message or "tensorstore" in message)


def checksum(leaves: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 over the names (JAX paths, `['a']['b']`) and values of a checkpoint's arrays."""
    crc = 0
    for path, leaf in sorted(leaves.items()):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, zlib.crc32(path.encode(), crc))
    return crc
