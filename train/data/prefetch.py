"""Batches on their way to the device while the device computes: `Prefetch`."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from repvgg_jax.errors import ConfigError

Host = TypeVar("Host")
Device = TypeVar("Device")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    """Stands for the end of the batches."""


class Prefetch(Iterator[Device], Generic[Host, Device]):
    """Takes batches and puts them on the device in a thread, ahead of time.

    An exception (of the batches or of `put`) reaches the caller of `next` at the batch that it struck; after it,
    as after the last batch, there is nothing more. `close` it before what it takes from, or use both in one
    `with` statement, the batches first.

    Args:
      batches: what to take from; only the thread does.
      put: starts the transfer of a batch and returns it as it is on the device, such as
        `functools.partial(jax.device_put, device=sharding)`; called in the thread.
      ahead: batches on the device, or on their way, that nobody has asked for yet. One more is being read.

    Raises:
      ConfigError: `ahead` is less than 1.
    """

    def __init__(self, batches: Iterator[Host], put: Callable[[Host], Device], ahead: int = 2) -> None:
        if ahead < 1:
            raise ConfigError(f"need at least 1 batch ahead, got {ahead}")
        self._queue: queue.SimpleQueue[Device | _Failure | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(batches, put), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Device:
        if self._stop.is_set():
            raise StopIteration
        try:
            item = self._queue.get()
        except BaseException:  # KeyboardInterrupt
            self.close()
            raise
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        if isinstance(item, _End):
            self.close()
            raise StopIteration
        self._room.release()
        return item

    def close(self) -> None:
        """Drop what is ahead and wait for the batch that is being read or put. Idempotent."""
        self._stop.set()
        self._room.release()  # for a thread that waits there
        self._thread.join()
        self._queue = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, batches: Iterator[Host], put: Callable[[Host], Device]) -> None:
        try:
            for batch in batches:
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._queue.put(put(batch))
        except BaseException as error:  # raised where the batch is asked for
            self._queue.put(_Failure(error))
        else:
            self._queue.put(_End())
