"""Worker processes that fill batches, where one process's lock would be the limit: `Workers`."""

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
"""Threads that one process can keep busy: more of them would wait for Python's lock."""
_SHARED_MEMORY = Path("/dev/shm")
# Batches in shared memory at a time: those that are on their way to the devices; and of each worker process, the one
# that it fills, and those that wait in Grain's two queues and between them.
_BATCHES_TAKEN, _BATCHES_OF_PROCESS = 4, 4
_START_SECONDS = 30


def processes_for(workers: int, processes: int | None, batch_bytes: int) -> int:
    """Return how many processes are to fill batches; 1 for the run's own.

    Args:
      workers: images that are decoded at a time, by all of them.
      processes: how many are asked for; None takes as many as can keep the workers busy, if there is room.
      batch_bytes: size of a batch.

    Raises:
      ConfigError: the processes that were asked for have no room in shared memory.
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
    """Processes that each make every n-th element of `dataset`, in shared memory; iterate, and `close`.

    They start at once, afresh: nothing of this process is copied into them but the data set. Signals are this process's
    affair. However it ends, they end too.
    """

    def __init__(self, dataset: "grain.MapDataset", count: int) -> None:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain has some, and the command line is not absl's
            flags.FLAGS.mark_as_parsed()
        inline = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=1)
        self._iterator: Any = iter(inline.mp_prefetch(options, worker_init_fn=_end_with_parent))
        before, deadline = multiprocessing.active_children(), time.monotonic() + _START_SECONDS
        self.processes: list[BaseProcess] = []
        with _signals_blocked(), _empty_main():
            self._iterator.get_state()  # makes each worker's iterator, which would otherwise be started one by one
            self._iterator.start_prefetch()  # in a thread each
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
        del self._iterator  # which would close itself once more, also when Python ends
        gc.collect()  # JAX's arrays that lie in shared memory are in circles of references


def _ended(exit_code: int) -> DataError:
    how = f"with status {exit_code}" if exit_code > 0 else f"by {signal.Signals(-exit_code).name}"
    why = {-signal.SIGKILL: " (is the memory full?)", -signal.SIGBUS: f" (is {_SHARED_MEMORY} full?)"}
    return DataError(
        f"a worker process was ended {how}{why.get(exit_code, '')}; use fewer --worker-processes (1 uses threads only)"
    )


def _end_with_parent(index: int, count: int) -> None:
    """In a worker: end when the parent has ended without a word, killed or by `os._exit`."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started inside the block never hear of the signals that stop a command."""
    # What removes the shared memory that a killed process leaves need not warn of it. It unblocks signals as it starts.
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
    """Processes that are started inside the block do not import the program: a command imports much, for seconds."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
