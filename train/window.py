"""The steps since the last row of the log: their metrics, which stay on the device, and their timing."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.errors import RepVGGError

IN_FLIGHT = 2
"""Steps that may be queued on the device: enough to keep it busy, too few for batches to fill the memory."""


class DivergedError(RepVGGError):
    """The loss or its gradient is not finite; raised in every process at the same step."""


class Window:
    """Collects the metrics of the parallel step and summarises them as rows.

    Args:
      batch_size: global batch size.
      flops_per_image: floating-point operations of one training step on one image.
      peak_flops: peak operations per second of all devices together; None if it is unknown.
    """

    def __init__(self, batch_size: int, flops_per_image: float | None = None, peak_flops: float | None = None):
        self._batch_size, self._flops_per_image, self._peak_flops = batch_size, flops_per_image, peak_flops
        self._metrics: list[tuple[int, Any]] = []
        self._in_flight: deque[Any] = deque()
        self._timed_steps, self._waited, self._start = 0, 0.0, time.monotonic()
        self._compiled = False

    def next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, and record the time that the loop waits for it."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def add(self, step: int, metrics: Any) -> None:
        """Add one step's metrics, as returned by the parallel step."""
        self._metrics.append((step, metrics))
        self._in_flight.append(metrics)
        self._timed_steps += 1
        if not self._compiled:  # the first step compiles, so it does not count for the speed
            jax.block_until_ready(metrics)
            self._compiled = True
            self.restart()
        if len(self._in_flight) > IN_FLIGHT:
            jax.block_until_ready(self._in_flight.popleft())

    def restart(self) -> None:
        """Restart the timing, after an evaluation or a checkpoint."""
        self._in_flight.clear()
        self._timed_steps, self._waited, self._start = 0, 0.0, time.monotonic()

    def check(self) -> None:
        """Wait for the steps, and stop a run that has diverged before its bad state is saved.

        Raises:
          DivergedError: a loss or gradient is not finite; the message has the step, learning rate and gradient norm.
        """
        self._metrics = [(step, _fetch(metrics)) for step, metrics in self._metrics]
        for step, metrics in self._metrics:
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
                raise DivergedError(
                    f"the loss is {metrics['loss']:.4g} at step {step} (learning rate {metrics['learning_rate']:.4g}, "
                    f"gradient norm {metrics['gradient_norm']:.4g}); the last good checkpoint is kept; "
                    "try a lower --learning-rate, more --warmup-epochs or --clip-norm"
                )

    def close(self) -> dict[str, float]:
        """Return a row with the means over the window and the speed, and empty the window."""
        self.check()
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rows = [metrics for _, metrics in self._metrics]
        row = {name: float(np.mean([m[name] for m in rows])) for name in ("loss", "top1", "gradient_norm")}
        row["learning_rate"] = float(rows[-1]["learning_rate"])
        if self._timed_steps:
            speed = self._timed_steps * self._batch_size / elapsed
            row |= {"images_per_second": speed, "data_wait": min(self._waited / elapsed, 1.0)}
            if self._flops_per_image and self._peak_flops:
                row["model_flop_utilization"] = speed * self._flops_per_image / self._peak_flops
        self._metrics = []
        self.restart()
        return row


def _fetch(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Copy one device's metrics to the host; floats are already there."""
    return {
        name: value if isinstance(value, float) else float(np.asarray(value.addressable_data(0)).reshape(-1)[0])
        for name, value in metrics.items()
    }
