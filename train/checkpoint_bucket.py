"""Checkpoints in a bucket: orbax writes each to a folder on this machine, and its files are uploaded as objects.

orbax itself supports only `gs://`, and removes a checkpoint's objects there in any order. Here, `commit_success.txt`,
orbax's marker of a complete checkpoint in a bucket, is the last object written and the first removed, so a process can
be killed at any moment. orbax can read such checkpoints in `gs://`.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from repvgg_jax.errors import RepVGGError, reason_of
from repvgg_jax.files import scratch_folder
from repvgg_jax.storage import BucketPath
from repvgg_jax.weights.training_run import MARKER, METRIC, complete_steps, evaluations

from . import cluster
from .checkpoint_folder import free_name


class BucketStore:
    """A run's checkpoints in a bucket: the newest `keep`, and the best one.

    Processes need to share nothing but the bucket: the first process writes, and each process reads by itself. Every
    process must call every method except `steps`. Errors are as for `FolderStore`.
    """

    def __init__(self, directory: BucketPath, keep: int):
        self._directory, self._keep = directory, keep
        self._cleanup = ExitStack()
        self._saving: Future[None] | None = None

    def begin(self) -> None:
        """Start from what is in the bucket, and remove incomplete checkpoints of a killed process."""
        if cluster.is_leader():
            complete = complete_steps(self._directory)
            for path in self._directory.iterdir():
                if path.name.isdecimal() and int(path.name) not in complete:
                    path.remove_folder()
            self._top1 = evaluations(self._directory)
        with ExitStack() as stack:
            self._scratch = stack.enter_context(scratch_folder("repvgg-checkpoints-", tempfile.gettempdir()))
            self._thread = stack.enter_context(ThreadPoolExecutor(1, "checkpoints"))
            self._orbax = stack.enter_context(_checkpointer())
            self._cleanup = stack.pop_all()

    def close(self) -> None:
        """Complete the save in progress."""
        with self._cleanup:
            self.wait()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return complete_steps(self._directory)

    def save(self, step: int, tree: Any, facts: Mapping[str, Any], top1: float | None) -> None:
        """Write a checkpoint in the background; return once a copy of `tree` is taken."""
        self.wait()
        if cluster.is_leader():
            copy = jax.tree.map(lambda leaf: np.array(leaf), tree)
            self._saving = self._thread.submit(self._write, step, copy, dict(facts), top1)

    def wait(self) -> None:
        """Wait until the last save is complete, and raise its error, if any."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except OSError as error:
                raise OSError(reason_of(error)) from error

    def facts(self, step: int) -> dict[str, Any]:
        """Return the facts of a checkpoint."""
        return self._orbax.restore(self._copy(step), args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]

    def state(self, step: int, template: Any) -> Any:
        """Return the state of a checkpoint, as arrays with the template's shapes."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        return self._orbax.restore(self._copy(step), args=args)["state"]

    def set_aside(self, steps: Sequence[int]) -> dict[int, str]:
        """Rename checkpoints; return their new names in the first process, and nothing in the others."""
        cluster.barrier("damaged checkpoints read")
        names = {}
        if cluster.is_leader():
            for step in steps:
                names[step] = free_name(step, self._directory)
                (self._directory / str(step)).move_folder(self._directory / names[step], first=[MARKER])
        cluster.barrier("damaged checkpoints set aside")
        return names

    def _copy(self, step: int) -> Path:
        """Return a copy of a checkpoint on this machine; the previous copy is removed."""
        copy = self._scratch / "read" / str(step)
        if not copy.exists():
            shutil.rmtree(copy.parent, ignore_errors=True)
            try:
                (self._directory / str(step)).download(copy)
            except OSError as error:  # the checkpoint itself may be intact
                shutil.rmtree(copy, ignore_errors=True)
                reason = error.strerror or error
                raise RepVGGError(f"cannot read {self._directory / str(step)}: {reason}") from error
        return copy

    def _write(self, step: int, tree: Any, facts: Mapping[str, Any], top1: float | None) -> None:
        shutil.rmtree(self._scratch / "read", ignore_errors=True)
        local, remote = self._scratch / str(step), self._directory / str(step)
        items = {"state": ocp.args.StandardSave(tree), "facts": ocp.args.JsonSave(dict(facts))}
        if top1 is not None:
            items["metrics"] = ocp.args.JsonSave({METRIC: top1})
        try:
            self._orbax.save(local, args=ocp.args.Composite(**items), force=True)
            remote.upload_folder(local, last=[MARKER])
        finally:
            shutil.rmtree(local, ignore_errors=True)
        if top1 is not None:
            self._top1[step] = top1
        self._remove_old()

    def _remove_old(self) -> None:
        steps = self.steps()
        evaluated = [(self._top1[step], step) for step in steps if step in self._top1]
        kept = {*steps[-self._keep :], *(step for _, step in sorted(evaluated)[-1:])}
        for step in steps:
            if step not in kept:
                (self._directory / str(step)).remove_folder(first=[MARKER])


def _checkpointer() -> ocp.Checkpointer:
    """Return an orbax checkpointer for this process alone, without barriers between processes."""
    number = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"process{number}"
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        facts=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        metrics=ocp.JsonCheckpointHandler(filename="metrics", multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
