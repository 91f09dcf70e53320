"""Checkpoints in a local or shared folder, kept by orbax's manager."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from repvgg_jax.weights.training_run import METRIC, evaluations

from . import cluster
from .orbax_support import LiteralPath


class FolderStore:
    """A run's checkpoints in a folder: the newest `keep`, and the best one.

    Every process must call every method except `steps`.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory, self._keep = directory, keep

    def begin(self) -> None:
        """Start from what is in the folder, and remove incomplete checkpoints of a killed process.

        Raises:
          OSError: the folder cannot be created or read.
        """
        best = _Best(evaluations(self._directory))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
            best_fn=_top1,  # without it, orbax writes no metrics
            lightweight_initialize=True,  # `evaluations` has read the metrics; a damaged file would make orbax fail
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(LiteralPath(self._directory), options=options)

    def close(self) -> None:
        """Complete the save in progress."""
        self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any, facts: Mapping[str, Any], top1: float | None) -> None:
        """Write a checkpoint in the background; return once a copy of `tree` is taken. Raises orbax's exceptions."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(tree), facts=ocp.args.JsonSave(dict(facts))),
            metrics=None if top1 is None else {METRIC: top1},
        )

    def wait(self) -> None:
        """Wait until the last save is complete, and raise its error, if any."""
        self._manager.wait_until_finished()

    def facts(self, step: int) -> dict[str, Any]:
        """Return the facts of a checkpoint. Raises any type of exception if it is damaged."""
        return self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]

    def state(self, step: int, template: Any) -> Any:
        """Return the state of a checkpoint, as arrays with the template's shapes; raise any exception if damaged."""
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))["state"]

    def set_aside(self, steps: Sequence[int]) -> dict[int, str]:
        """Rename checkpoints; return their new names in the first process, and nothing in the others."""
        self._manager.close()
        names = {}
        if cluster.is_leader():
            for step in steps:
                names[step] = free_name(step, self._directory)
                (self._directory / str(step)).rename(self._directory / names[step])
        cluster.barrier("damaged checkpoints set aside")
        self.begin()
        return names


def free_name(step: int, directory: Any) -> str:
    """Return an unused name for a damaged checkpoint in `directory`."""
    names = (f"{step}.damaged{number or ''}" for number in itertools.count())
    return next(name for name in names if not (directory / name).exists())


def _top1(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


class _Best(policies.PreservationPolicy):
    """Keep the checkpoint with the best evaluation; of several with the same accuracy, the newest.

    Args:
      earlier: top-1 by step of the checkpoints of earlier processes; orbax's manager knows only their steps.
    """

    def __init__(self, earlier: Mapping[int, float]):
        self._earlier = earlier

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        """Return, for each checkpoint, whether it is the best."""
        del context
        evaluated = {
            info.step: self._earlier.get(info.step) if info.metrics is None else _top1(info.metrics)
            for info in checkpoints
        }
        best = max(((top1, step) for step, top1 in evaluated.items() if top1 is not None), default=(None, None))[1]
        return [info.step == best for info in checkpoints]
