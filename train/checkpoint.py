"""Checkpoints of a run, by orbax: written in the background, complete or not there at all."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from repvgg_jax.errors import RepVGGError

from .state import TrainState


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, the newest `keep` of them."""

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Save an unreplicated state under its step; returns once a copy is taken."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(_as_dict(state)))

    def restore(self, template: TrainState) -> TrainState:
        """The newest checkpoint, or `template` itself if there is none.

        Raises:
          RepVGGError: the checkpoint cannot be read or belongs to another model.
        """
        step = self.latest_step()
        if step is None:
            return template
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(template))
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RepVGGError(f"cannot resume from {self._manager.directory}/{step}: {reason}") from error
        return TrainState(**restored)

    def close(self) -> None:
        """Wait for the last save to be complete."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
    }
