"""A training run's checkpoints, read as a weight file: `runs/x` for the best of them, `runs/x/checkpoints/6` for one.

They are orbax's, as `train/checkpoint.py` writes them: an item `state` with the arrays, and an item `facts` that says,
in JSON, which net it is (as a native file's header does), which arrays there are, and their common CRC-32.
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
"""What orbax writes into a checkpoint last. In a bucket, where nothing is renamed, one without it is not complete."""
MAX_FACTS_BYTES = 64 << 20
AVERAGED = "batch_stats"
"""What each device has of its own; its average over them is the net's."""

GRACE_SECONDS = 0.2
"""How long tensorstore's further operations may take to fail after the first, whose error orbax has raised."""

COLLECTIONS = {
    False: {"params": "params", AVERAGED: AVERAGED},
    True: {"ema_params": "params", f"ema_{AVERAGED}": AVERAGED},
}
"""By whether the moving average is asked for: the state's fields, and what they are called in a net's variables."""

QAT_RANGE = "input_range"
"""What quantisation-aware training keeps beside BN statistics, and no float net has."""


def find_checkpoint(folder: Folder) -> tuple[Folder, str | None]:
    """Return the checkpoint that a folder is, or the best in it, and what a user should hear about the choice.

    Args:
      folder: a run's folder, its `checkpoints`, or one checkpoint.

    Raises:
      WeightsError: there is none.
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
    """Return top-1 by step of a run's checkpoints that have been evaluated, the better one of weights and average.

    It is in the checkpoint, as orbax's metrics; for those of earlier versions, or where that file is damaged, in the
    run's metrics.jsonl.
    """
    best_top1: dict[int, float] = {}
    absent = FileNotFoundError if isinstance(checkpoints, BucketPath) else OSError  # a bucket may answer later
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
    """Return a checkpoint as a native file of training form; its arrays are read when the first of them is.

    Args:
      handle: its `FACTS`, open.
      folder: the checkpoint.
      ema: take the moving average of the weights.

    Raises:
      WeightsError: damaged, without a moving average, or of a release that did not say which net it is.
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
    """`['params']['linear']['bias']` -> `params/linear/bias`."""
    return "/".join(re.findall(r"\['([^']*)'\]", key))


def _key(name: str) -> str:
    """The inverse of `_name`."""
    return "".join(f"['{part}']" for part in name.split("/"))


def _places(shapes: Mapping[str, Any], ema: bool) -> dict[str, str]:
    """Return the name in the state by the name among a net's variables."""
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
    """A checkpoint, whose arrays are all read when the first of them is. A tensor's offset is its number.

    Attributes:
      shapes: of the state's arrays, by name.
      crc32: of all of them.
      places: the name in the state of each tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    crc32: int
    places: list[str]
    _arrays: list[np.ndarray] = dataclasses.field(default_factory=list)

    def read(self, tensor: Tensor) -> np.ndarray:
        """As `TensorFile.read`."""
        with self._lock:
            if not self._arrays:
                state = _restore(self.path, self.shapes, self.crc32)
                self._arrays = [state[p].mean(0) if _is_averaged(p) else state[p] for p in self.places]
        return self._arrays[tensor.offset]


def _restore(folder: Path, shapes: Mapping[str, tuple[int, ...]], crc32: int) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint by name, which must be those that were saved.

    Raises:
      WeightsError: orbax is not installed, cannot read them, or they are others.
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
        except Exception as error:  # damage comes out of orbax and tensorstore as whatever they like
            time.sleep(GRACE_SECONDS)
            raise WeightsError(f"cannot read {folder}: damaged checkpoint ({shown(reason_of(error))})") from error
    same_shapes = {name: leaf.shape for name, leaf in leaves.items()} == dict(shapes)
    if not same_shapes or checksum({_key(name): leaf for name, leaf in leaves.items()}) != crc32:
        raise WeightsError(f"cannot read {folder}: damaged checkpoint (its contents are not what was saved)")
    return leaves


@contextlib.contextmanager
def without_late_failures() -> Iterator[None]:
    """Leave out the further failures of tensorstore's operations after the first, whose error orbax has raised."""
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
    """Return the CRC-32 over names (as JAX writes paths, `['a']['b']`) and numbers of a checkpoint's arrays."""
    crc = 0
    for path, leaf in sorted(leaves.items()):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, zlib.crc32(path.encode(), crc))
    return crc
