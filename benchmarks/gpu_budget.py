"""Settings of `benchmarks.gpu`, and its time limit."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .contest import Contestant, ContestantDiedError

PRECISIONS = {"bfloat16": ("bfloat16", False), "tf32": ("float32", True), "float32": ("float32", False)}


def environment() -> dict[str, str]:
    """Return the environment of a worker; the frameworks share the device, so JAX must not preallocate its memory."""
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Cases to measure, and the duration of a measurement."""

    minutes: float
    models: Sequence[str]
    training: Sequence[tuple[str, int]]
    batch_sizes: Sequence[int]
    precisions: Sequence[str]
    image_size: int
    check_size: int
    rounds: int
    seconds: float
    torch_mode: str | None
    cifar10: Sequence[str]
    photographs: Path | None = None


FULL = Settings(
    minutes=8,
    models=(),
    training=(("RepVGG-A0", 128), ("RepVGG-D2se", 64), ("RepVGG-B1", 128)),
    batch_sizes=(1, 128, 32, 1024),
    precisions=tuple(PRECISIONS),
    image_size=224,
    check_size=64,
    rounds=5,
    seconds=0.3,
    torch_mode="max-autotune",
    cifar10=("--epochs", "100", "--batch-size", "512", "--dtype", "bfloat16", "--evaluate-every", "20"),
)
DRY = Settings(
    minutes=8,
    models=("RepVGG-A0",),
    training=(("RepVGG-A0", 2),),
    batch_sizes=(1, 2),
    precisions=("float32",),
    image_size=32,
    check_size=32,
    rounds=1,
    seconds=0.0,
    torch_mode=None,
    cifar10=("--epochs", "1", "--batch-size", "8", "--warmup-epochs", "0"),
)


class Clock:
    """The time that is left, and the measurements that were skipped for lack of it."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def seconds_left(self) -> float:
        """Return the seconds until the end; negative after it."""
        return self._end - time.monotonic()

    @contextmanager
    def stops(self, what: str, contestants: Sequence[Contestant]) -> Iterator[None]:
        """Kill the contestants when the time is over, and record `what` as not measured."""
        timer = threading.Timer(max(self.seconds_left(), 0), lambda: [contestant.kill() for contestant in contestants])
        timer.start()
        try:
            yield
        except ContestantDiedError:
            if self.seconds_left() > 0:
                raise
            self.left_out.append(what)
            print(f"{what}: stopped, the time is over", flush=True)
        finally:
            timer.cancel()

    def allows(self, what: str, seconds: float) -> bool:
        """Return whether about `seconds` are left; if not, record `what` as not measured."""
        if self.seconds_left() >= seconds:
            return True
        self.left_out.append(what)
        print(f"{what}: skipped, {max(self.seconds_left(), 0):.0f} s are not enough", flush=True)
        return False
