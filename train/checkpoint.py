"""Checkpoints of a run, by orbax: written in the background, complete or absent, verified when read.

`checkpoint_folder.py` and `checkpoint_bucket.py` store them; this module defines their content.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax.errors import RepVGGError, system_errors
from repvgg_jax.paths import Place
from repvgg_jax.storage import BucketPath
from repvgg_jax.weights.training_run import GRACE_SECONDS, checksum

from .checkpoint_bucket import BucketStore
from .checkpoint_folder import FolderStore
from .orbax_support import orbax_messages
from .parallel import distribute, gather_to_host, replicate, to_host
from .state import TrainState
from .window import DivergedError

# Fields that differ between devices; a checkpoint keeps them for each device.
PER_DEVICE = ("batch_stats", "ema_batch_stats")


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """Facts that a run's input depends on, stored in every checkpoint and compared when the run resumes.

    Attributes:
      seed: seed of the order and the augmentation.
      batch_size: global batch size.
      train_images: number of images in the training split.
      devices: number of devices of all processes; if it changes, the resumed run is not bit-exact.
      classes, images: fingerprints of the training split's class names and of a sample of its images; empty in
        checkpoints of earlier versions.
      net: the trained net as a native weight file's header describes it, so that a checkpoint is a weight file.
    """

    seed: int
    batch_size: int
    train_images: int
    devices: int
    classes: str = ""
    images: str = ""
    net: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`: the newest `keep`, and the one with the best evaluation.

    Every process must call every method. `note` receives messages for the user.
    """

    def __init__(self, workdir: Place, keep: int, note: Callable[[str], None] = print):
        self._note = note
        self._directory = workdir / "checkpoints"
        self._store: BucketStore | FolderStore
        if isinstance(self._directory, BucketPath):
            self._store = BucketStore(self._directory, keep)
            self._saves_alone = True
        else:
            self._directory = self._directory.absolute()
            self._store = FolderStore(self._directory, keep)
            self._saves_alone = jax.process_count() == 1
        self._cleanup, self._orbax_failed = contextlib.ExitStack(), False

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return self._store.steps()

    def save(self, state: TrainState, facts: RunFacts, top1: float | None = None) -> None:
        """Save a state in the background; return once a copy is taken.

        Args:
          state: state of the parallel step, with a leading axis of devices; it is saved under its step.
          facts: facts to store with it.
          top1: accuracy of the step's evaluation, if there was one; the checkpoint with the best one is kept.

        Raises:
          RepVGGError: this checkpoint, or the previous one in the background, could not be written.
        """
        tree = _to_host(state)
        step = int(tree["step"])
        described = {"facts": dataclasses.asdict(facts), "shapes": _shapes(tree), "crc32": checksum(_flat(tree))}
        try:
            self._store.save(step, tree, described, top1)
        except Exception as error:  # tensorstore and orbax raise various types for a full disk
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          RepVGGError: the checkpoint could not be written.
        """
        try:
            self._store.wait()
        except Exception as error:
            raise self._failed(None, error) from error

    def __enter__(self) -> "Checkpoints":
        with contextlib.ExitStack() as stack:
            stack.enter_context(orbax_messages(self._note))
            try:
                self._store.begin()
            except OSError as error:
                raise RepVGGError(f"cannot use {self._directory}: {error.strerror or error}") from error
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Complete the save in progress, even after another error, and release the folder.

        If other processes take part in the save, wait for it only if they certainly do the same.
        """
        with self._cleanup:
            if error is None:
                self.wait()
                self._store.close()
            elif self._saves_alone or isinstance(error, DivergedError):
                with contextlib.suppress(Exception):  # the user should read the first error
                    self._store.close()
            if error is not None and self._orbax_failed:
                time.sleep(GRACE_SECONDS)

    def restore(
        self, fresh: TrainState, facts: RunFacts, begin: Callable[[TrainState], TrainState] = lambda state: state
    ) -> TrainState:
        """Return the newest readable checkpoint's state on the devices, or `begin(fresh)` if there is none.

        A checkpoint that cannot be read, or whose checksum does not match, is skipped with a note in favour of the
        previous one, and renamed, because a new save of that step needs its name.

        Args:
          fresh: one host copy of a state of the same shapes.
          facts: facts that the checkpoint must agree with.
          begin: work on `fresh` that only a run without a checkpoint needs.

        Raises:
          RepVGGError: no checkpoint can be read, or it belongs to another model or input.
        """
        with system_errors(RepVGGError, f"cannot read {self._directory}"):
            steps = self.steps()
        problems = []
        for step in reversed(steps):
            try:
                tree, saved = self._read(step, fresh)
            except _UnfittingError as error:
                raise RepVGGError(f"cannot resume from {self._directory}/{step}: {error}") from error
            except RepVGGError:  # it cannot be reached, but it may be intact
                raise
            except Exception as error:  # a damaged checkpoint fails anywhere in orbax, tensorstore or json
                self._orbax_failed = True
                problems.append(f"step {step}: {_line(error)}")
                self._note(f"checkpoint {self._directory}/{step} is damaged ({_line(error)}); trying the previous one")
                continue
            self._compare(step, saved, facts)
            self._set_aside(steps[steps.index(step) + 1 :])
            return _to_devices(tree, fresh)
        if problems:
            raise RepVGGError(
                f"none of the checkpoints in {self._directory} can be read ({'; '.join(problems)}); "
                "they are left as they are; choose another --workdir to start again"
            )
        return _to_devices(_template(begin(fresh), facts.devices), fresh)

    def _read(self, step: int, fresh: TrainState) -> tuple[dict[str, Any], RunFacts]:
        described = self._store.facts(step)
        saved = RunFacts(**described["facts"])
        template = _template(fresh, saved.devices)
        expected, in_file = _shapes(template), described["shapes"]
        if in_file != expected:
            first, *more = sorted(p for p in expected.keys() | in_file.keys() if expected.get(p) != in_file.get(p))
            raise _UnfittingError(f"it belongs to another model or optimizer ({first} and {len(more)} more differ)")
        tree = jax.tree.map(np.asarray, self._store.state(step, template))
        if checksum(_flat(tree)) != described["crc32"]:
            raise ValueError("its contents are not what was saved")
        return tree, saved

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Rename checkpoints that could not be read, instead of deleting them."""
        if steps:
            for step, name in self._store.set_aside(steps).items():
                self._note(f"{self._directory}/{step} is now {name}")

    def _compare(self, step: int, saved: RunFacts, facts: RunFacts) -> None:
        for name in ("seed", "batch_size", "train_images"):
            before, now = getattr(saved, name), getattr(facts, name)
            if before != now:
                raise RepVGGError(f"cannot resume from {self._directory}/{step}: {name} was {before} and is {now}")
        if saved.classes and saved.classes != facts.classes:
            raise RepVGGError(f"cannot resume from {self._directory}/{step}: the data set has different classes")
        if saved.images and saved.images != facts.images:
            self._note("the training images are not those at the run's start, so it is no longer bit-exact")
        if saved.devices != facts.devices:
            self._note(
                f"resuming a run of {saved.devices} devices on {facts.devices}: the global batches are the same, but "
                "BN statistics are now averaged and sums are ordered differently, so it is no longer bit-exact"
            )

    def _failed(self, step: int | None, error: Exception) -> RepVGGError:
        self._orbax_failed = True
        what = "the last checkpoint" if step is None else f"the checkpoint of step {step} or the one before"
        try:
            kept = self.steps()
            remains = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no earlier one"
        except OSError:  # a bucket that cannot be reached
            remains = "the one before is kept"
        return RepVGGError(f"cannot write {what} to {self._directory}: {_line(error)}; {remains}")


class _UnfittingError(Exception):
    """Raised for an intact checkpoint of another model or optimizer."""


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {path: list(np.shape(leaf)) for path, leaf in _flat(tree).items()}


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _fields(state: TrainState) -> dict[str, Any]:
    """Return a state as nested dicts, without the fields that are None.

    orbax would not restore the named tuples of an optimizer's state, so its leaves are stored by number in tree order.
    """
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields["opt_state"] = {f"{number:04}": leaf for number, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {name: value for name, value in fields.items() if value is not None}


def _to_host(state: TrainState) -> dict[str, Any]:
    """Return NumPy copies: one of what all devices share, and one per device of what differs."""
    return {name: (gather_to_host if name in PER_DEVICE else to_host)(value) for name, value in _fields(state).items()}


def _template(fresh: TrainState, devices: int) -> dict[str, Any]:
    """Return a fresh host state in the shape of a checkpoint that was written with `devices` devices."""

    def for_each_device(leaf: np.ndarray) -> np.ndarray:
        return np.broadcast_to(leaf, (devices, *leaf.shape))

    fields = _fields(jax.tree.map(np.asarray, fresh))
    return {
        name: jax.tree.map(for_each_device, value) if name in PER_DEVICE else value for name, value in fields.items()
    }


def _to_devices(tree: dict[str, Any], fresh: TrainState) -> TrainState:
    """Return a checkpoint's content as a state for the parallel step."""
    leaves = [tree["opt_state"][key] for key in sorted(tree["opt_state"])]
    tree = tree | {"opt_state": jax.tree.unflatten(jax.tree.structure(fresh.opt_state), leaves)}
    return TrainState(
        **{name: (_to_each_device if name in PER_DEVICE else replicate)(value) for name, value in tree.items()}
    )


def _to_each_device(stats: Any) -> Any:
    """Give each device its statistics, or the average to all if the number of devices has changed."""
    devices = jax.device_count()
    if len(jax.tree.leaves(stats)[0]) != devices:
        stats = jax.tree.map(lambda leaf: np.broadcast_to(leaf.mean(0), (devices, *leaf.shape[1:])), stats)
    return distribute(stats)


def _line(error: Exception) -> str:
    """Return an error's text as one line of bounded length: its beginning, and its end with the system's reason."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
