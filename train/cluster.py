"""Runs with several processes: JAX's distributed runtime, started from flags or from the cluster's environment."""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

from repvgg_jax import interrupts
from repvgg_jax.errors import ConfigError

from .parallel import sum_over_processes
from .recipe import ClusterOptions

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as dead, and the others stop."""

# Set by launchers inside a job step of several tasks; JAX interprets them.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "MEGASCALE_NUM_SLICES")


def start(options: ClusterOptions) -> None:
    """Join the other processes, if there are any. Must run before any device is used.

    Raises:
      ConfigError: the flags are incomplete, or the cluster does not answer.
    """
    flags = (options.coordinator_address, options.num_processes, options.process_id)
    if all(flag is None for flag in flags) and not in_cluster():
        return
    if any(flag is None for flag in flags) and not in_cluster():
        raise ConfigError("--coordinator-address, --num-processes and --process-id go together")
    try:
        jax.distributed.initialize(*flags, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot join the cluster at {options.coordinator_address or 'its own address'}: {reason}"
        ) from error


def in_cluster() -> bool:
    """Return whether the environment describes a run of several processes (SLURM, Open MPI, TPU pod, JAX)."""
    counts = [os.environ.get(name, "") for name in _TASK_COUNTS]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return any(count.isdigit() and int(count) > 1 for count in counts) or "," in hosts


def is_leader() -> bool:
    """Return whether this process is the one that writes logs and weights."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def abandon(error: BaseException) -> None:
    """Exit at once from a run whose other processes can no longer be reached, without waiting for them."""
    reason = " ".join(str(error).split())[:200]
    print(f"error: another process of this run has died or cannot be reached ({reason})", file=sys.stderr, flush=True)
    os._exit(1)


class Preemption:
    """A context manager in which a signal requests a stop after the current step instead of ending the process.

    In a command, the signals are SIGTERM, SIGINT (Ctrl-C; a second one ends the process at once) and SIGHUP, from the
    first call of `asked` on; before the first step, there is nothing to save. Elsewhere, the signal is SIGTERM.

    With several processes, JAX's preemption service receives SIGTERM and stops all of them at the same step.
    """

    def __init__(self):
        self._asked = False
        self._before = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1 and not interrupts.watching():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        interrupts.end_deferral()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def asked(self, step: int) -> bool:
        """Return whether to stop after `step`; every process gets the same answer."""
        interrupts.defer(_answer)
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._asked = True
        return self._asked or (jax.process_count() == 1 and interrupts.requested() is not None)

    def stopping(self) -> bool:
        """Return whether a stop was requested, even after the last step.

        Every process must call it, and gets the same answer.
        """
        return self._asked or sum_over_processes(int(interrupts.requested() is not None)) > 0


def _answer(number: signal.Signals) -> None:
    """Print what a signal will do, and pass it on to the other processes."""
    if is_leader():
        interrupts.say(f"\n{number.name}: saving the state after this step; press Ctrl-C again to stop without saving")
    if jax.process_count() > 1 and number != signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_signal() -> signal.Signals:
    """Return the signal that has stopped the run; SIGTERM if another process received it."""
    return interrupts.requested() or signal.SIGTERM
