"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM, and SIGHUP when its terminal is closed.

Python runs a signal handler in the main thread, the next time that thread executes Python code. This may be minutes
later if XLA is compiling. It may also be inside a callback from C++, which may swallow the handler's exception or crash
on it. The handlers here therefore do nothing. A thread receives the signals through `signal.set_wakeup_fd`. It ends the
process, or, if there is state to save first (`defer`), records that the process has to stop.

Only commands call `watch`. Programs that use the library keep their own handlers.
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
"""Time limit in seconds for each final step before exit: a terminal, a pipe or a file system may be stuck."""


class _Watch:
    """State shared by the signal thread and the main thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.active = False
        self.requested: signal.Signals | None = None
        self.actions: list[Callable[[], object]] = []
        self.on_request: Callable[[signal.Signals], object] | None = None
        self.terminals: list[int] = []


_watch = _Watch()


def watch() -> None:
    """Watch for signals until the process ends. A signal ends it at once, with status 128 + the signal's number.

    A signal that the parent process ignores (`nohup`, a background job of a script) stays ignored. On Windows, this
    function does nothing, because there is no wakeup pipe for signals.
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
    atexit.register(_ignore_from_now_on)  # registered first, so called last
    _watch.active = True


def watching() -> bool:
    """Return whether this process is a command that watches for signals."""
    return _watch.active


def requested() -> signal.Signals | None:
    """Return the first signal since `defer`, or None."""
    return _watch.requested


def defer(on_request: Callable[[signal.Signals], object] = lambda number: None) -> None:
    """Let the next signal only request a stop (`requested`); a later SIGINT still ends the process at once.

    Args:
      on_request: called with the first signal, in the signal thread.
    """
    with _watch.lock:
        _watch.on_request = on_request


def end_deferral() -> None:
    """Let a signal end the process at once again."""
    with _watch.lock:
        _watch.on_request = None


@contextlib.contextmanager
def on_exit(action: Callable[[], object]) -> Iterator[None]:
    """Run `action` if a signal ends the process inside the block; `finally` clauses do not run in that case.

    The action runs in another thread, and the block may still be running.
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
    """Delay signals until the block ends; for short operations that must not be interrupted halfway.

    If a signal is already ending the process, the block does not start: the call waits until the process has ended.
    """
    with _watch.lock:
        yield


def say(line: str) -> None:
    """Print a line to stderr, bypassing Python's streams, whose locks the main thread may hold."""

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
    """End the process without running more of the main thread's code; called with the lock held."""
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
    """Redirect further output to /dev/null: printing to a closed terminal fails."""
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
    """Replace Python's default handler: the signal thread is notified through the pipe."""
    del number, frame


def _ignore_from_now_on() -> None:
    """Ignore signals during exit: Python restores the default handlers, and a signal would change the exit status."""
    for number in SIGNALS:
        if signal.getsignal(number) == _do_nothing:
            signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """Keep a forked child's signals out of its parent's pipe."""
    with contextlib.suppress(ValueError):  # not forked from the main thread
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == _do_nothing:
                signal.signal(number, signal.SIG_DFL)
