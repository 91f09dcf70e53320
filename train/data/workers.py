"""Worker processes that fill batches, for machines where one process's lock would be the limit."""

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.interrupts import SIGNALS
from repvgg_jax.machine import cores

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)

WORKERS_PER_PROCESS = 8
"""Threads that one process can keep busy; more would wait for Python's lock."""
_SHARED_MEMORY = Path("/dev/shm")
# Batches in shared memory at a time: those in transfer to the devices, and, for each worker process, the batch that it
# fills and those in Grain's two queues and between them.
_BATCHES_TAKEN, _BATCHES_OF_PROCESS = 4, 4
_START_SECONDS = 30


def processes_for(workers: int, processes: int | None, batch_bytes: int) -> int:
    """Return the number of processes that fill batches; 1 stands for the run's own process.

    Args:
      workers: number of decoding threads of all processes together.
      processes: requested number of processes; None takes as many as keep the threads busy and fit in shared memory.
      batch_bytes: size of a batch.

    Raises:
      ConfigError: there is not enough shared memory for the requested processes.
    """
    wanted = max(1, workers // WORKERS_PER_PROCESS) if processes is None else processes
    if wanted == 1:
        return 1
    needed = (_BATCHES_TAKEN + wanted * _BATCHES_OF_PROCESS) * batch_bytes
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else needed
    if free < needed:
        problem = (
            f"{wanted} worker processes need {needed / 2**20:.0f} MiB of shared memory, and {_SHARED_MEMORY} has "
            f"{free / 2**20:.0f}; give the container more (docker run --shm-size)"
        )
        if processes is not None:
            raise ConfigError(f"{problem}, or use --worker-processes 1")
        logger.warning("%s; decoding in threads of one process", problem)
        return 1
    if wanted > cores():
        logger.warning("%d worker processes share %d cores; fewer would be enough", wanted, cores())
    return wanted


class Workers:
    """Processes that each make every n-th element of `dataset` in shared memory; iterate over it, then `close` it.

    The processes start immediately, and only the data set is copied into them. They ignore the signals that stop a
    command, and they end when this process ends, however that happens.
    """

    def __init__(self, dataset: "grain.MapDataset", count: int) -> None:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain has absl flags, but absl does not parse the command line here
            flags.FLAGS.mark_as_parsed()
        inline = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=1)
        self._iterator: Any = iter(inline.mp_prefetch(options, worker_init_fn=_end_with_parent))
        before, deadline = multiprocessing.active_children(), time.monotonic() + _START_SECONDS
        self.processes: list[BaseProcess] = []
        with _signals_blocked(), _empty_main():
            self._iterator.get_state()  # makes each worker's iterator; otherwise they would start one after the other
            self._iterator.start_prefetch()  # each in a thread
            while len(self.processes) < count and time.monotonic() < deadline:
                time.sleep(0.01)
                self.processes = [process for process in multiprocessing.active_children() if process not in before]

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            for process in self.processes:
                if process.exitcode:
                    raise _ended(process.exitcode) from error
            raise

    def close(self) -> None:
        """End the processes."""
        self._iterator.close()
        del self._iterator  # otherwise it would close itself again, at the latest when Python exits
        gc.collect()  # JAX arrays in shared memory are in reference cycles


def _ended(exit_code: int) -> DataError:
    how = f"with status {exit_code}" if exit_code > 0 else f"by {signal.Signals(-exit_code).name}"
    why = {-signal.SIGKILL: " (is the memory full?)", -signal.SIGBUS: f" (is {_SHARED_MEMORY} full?)"}
    return DataError(
        f"a worker process was ended {how}{why.get(exit_code, '')}; use fewer --worker-processes (1 uses threads only)"
    )


def _end_with_parent(index: int, count: int) -> None:
    """In a worker: end when the parent was killed or has ended with `os._exit`."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes inside the block so that they never receive the signals that stop a command."""
    # The resource tracker removes the shared memory of a killed process, and need not warn about it. It unblocks
    # signals when it starts.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    """Start processes inside the block without importing the program in them, which would take seconds."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
