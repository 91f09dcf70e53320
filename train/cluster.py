"""Several processes as one run: JAX's own distributed runtime, started from flags or from the cluster's environment."""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

from repvgg_jax.errors import ConfigError

from .config import ClusterConfig

HEARTBEAT_SECONDS = 30
"""A process that has been silent for so long counts as dead, and the others stop."""

PREEMPTED = 143
"""Exit status after SIGTERM: 128 + 15, as a shell reports it. The run is not finished."""

# Set by launchers inside a job step of several tasks; what they mean is left to JAX.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "MEGASCALE_NUM_SLICES")


def start(config: ClusterConfig) -> None:
    """Join the other processes, if there are any. Must run before anything touches a device.

    Raises:
      ConfigError: flags that do not fit together, or a cluster that does not answer.
    """
    flags = (config.coordinator_address, config.num_processes, config.process_id)
    if all(flag is None for flag in flags) and not in_cluster():
        return
    if any(flag is None for flag in flags) and not in_cluster():
        raise ConfigError("--coordinator-address, --num-processes and --process-id go together")
    try:
        jax.distributed.initialize(*flags, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot join the cluster at {config.coordinator_address or 'its own address'}: {reason}"
        ) from error


def in_cluster() -> bool:
    """Whether the environment says that this is one of several processes (SLURM, Open MPI, TPU pod, JAX's own)."""
    counts = [os.environ.get(name, "") for name in _TASK_COUNTS]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return any(count.isdigit() and int(count) > 1 for count in counts) or "," in hosts


def is_leader() -> bool:
    """Whether this process writes logs and weights."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def abandon(error: BaseException) -> None:
    """Leave a run whose other processes cannot be reached any more, without waiting for them."""
    reason = " ".join(str(error).split())[:200]
    print(f"error: another process of this run has died or cannot be reached ({reason})", file=sys.stderr, flush=True)
    os._exit(1)


class Preemption:
    """A context manager in which SIGTERM asks for a stop instead of killing the process.

    Among several processes, JAX's preemption service hears the signal and makes all of them stop at the same step.
    """

    def __init__(self):
        self._asked = False
        self._before = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
