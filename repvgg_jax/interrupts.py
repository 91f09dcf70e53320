"""The signals that stop a command: SIGINT (Ctrl-C), SIGTERM, and SIGHUP when its terminal is closed.

Python runs a signal's handler in the main thread when that next executes Python: minutes later if XLA is compiling, or
inside a callback from C++, which may swallow the handler's exception or crash on it. So the handlers here do nothing. A
thread hears of the signals through `signal.set_wakeup_fd`; it ends the process, or where there is a state to save first
(`defer`), it notes that the process is to stop.

Only commands call `watch`. Who uses the library keeps the handlers that are in place.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

LAST_SECONDS = 2
"""How long the end of a process may take: a terminal, a pipe or a file system may be stuck."""


class _Watch:
    """What the thread that hears of signals and the main thread share."""

    def __init__(self):
        self.lock = threading.Lock()
        self.active = False
        self.requested: signal.Signals | None = None
        self.actions: list[Callable[[], object]] = []
        self.on_request: Callable[[signal.Signals], object] | None = None
        self.terminals: list[int] = []


_watch = _Watch()


def watch() -> None:
    """Watch for signals from now to the end of the process. They end it at once, with status 128 + the signal's number.

    A signal that the parent has set to be ignored (`nohup`, a script's background job) stays so. On Windows, which has
    no such thing as a wakeup pipe, nothing changes.
    """
    if _watch.active or sys.platform == "win32":
        return
    _watch.terminals = [stream for stream in (1, 2) if _is_terminal(stream)]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reading,), name="signals", daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _do_nothing)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore_from_now_on)  # before all others, and so called after them
    _watch.active = True


def watching() -> bool:
    """Whether this process is a command that watches for signals."""
    return _watch.active


def requested() -> signal.Signals | None:
    """Return the first signal since `defer`; None if there was none."""
    return _watch.requested


def defer(on_request: Callable[[signal.Signals], object] = lambda number: None) -> None:
    """From now on, a signal only asks for a stop (`requested`); a SIGINT after that ends the process at once.

    Args:
      on_request: called with the first signal, in the thread that hears of it.
    """
    with _watch.lock:
        _watch.on_request = on_request


def end_deferral() -> None:
    """From now on, a signal ends the process at once again."""
    with _watch.lock:
        _watch.on_request = None


@contextlib.contextmanager
def on_exit(action: Callable[[], object]) -> Iterator[None]:
    """Inside the block, do `action` when a signal ends the process: nothing else of the block is executed then.

    It runs in another thread, while the block may still be running.
    """
    with _watch.lock:
        _watch.actions.append(action)
    try:
        yield
    finally:
        with _watch.lock:
            _watch.actions.remove(action)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let a signal that comes inside the block wait for its end: for what must not be torn apart, and is over at once.

    One that is already ending the process lets the block wait instead, for ever.
    """
    with _watch.lock:
        yield


def say(line: str) -> None:
    """Print a line on stderr without Python's streams, whose locks the main thread may hold."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())

    _within_seconds(write)


def _hear(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            if number in SIGNALS:
                _handle(signal.Signals(number))


def _handle(number: signal.Signals) -> None:
    if number.name == "SIGHUP":
        _leave_terminal()
    with _watch.lock:
        again = _watch.requested is not None
        if _watch.on_request is None or (again and number == signal.SIGINT):
            _leave(number)
        if again:
            return
        _watch.requested, on_request = number, _watch.on_request
    on_request(number)


def _leave(number: signal.Signals) -> NoReturn:
    """End the process without another line of its own code, with the lock held."""
    _within_seconds(_last_actions)
    say("interrupted" if number == signal.SIGINT else f"stopped by {number.name}")
    os._exit(128 + number)


def _last_actions() -> None:
    for action in reversed(_watch.actions):
        with contextlib.suppress(Exception):
            action()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _within_seconds(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LAST_SECONDS)


def _leave_terminal() -> None:
    """Let what is still printed go nowhere: printing to a terminal that is closed fails."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in _watch.terminals:
            os.dup2(nowhere, stream)


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:
        return False


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Stand in the place of Python's own handler: the thread hears of the signal by the pipe."""
    del number, frame


def _ignore_from_now_on() -> None:
    """Let no signal change the status of finished work: Python's end gives handled ones their first meaning back."""
    for number in SIGNALS:
        if signal.getsignal(number) == _do_nothing:
            signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """Keep a forked child's signals out of its parent's pipe."""
    with contextlib.suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == _do_nothing:
                signal.signal(number, signal.SIG_DFL)
