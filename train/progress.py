"""Display of a run's progress: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from repvgg_jax.interrupts import on_exit, requested


class RunProgress:
    """A context manager that shows step, loss, accuracy, images/s and, once a step has been timed, the time left.

    Args:
      total_steps: last step of the run.
      steps_per_epoch: number of steps per epoch, to compute the epoch.
      shown: whether to print at all; only one of several processes does.
    """

    def __init__(self, total_steps: int, steps_per_epoch: int, *, shown: bool = True):
        self._console = _Console(soft_wrap=True, highlight=False, quiet=not shown)
        self._live = self._console.is_terminal and shown
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._timed_from: tuple[int, float] | None = None
        self._on_exit = contextlib.ExitStack()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=total_steps, epoch=0, text="compiling …")

    def start(self, step: int) -> None:
        """Begin at `step`, where the run starts or resumes."""
        self._timed_from = None
        self._bar.reset(self._task, total=self._total, completed=step, epoch=0, text="compiling …")

    def __enter__(self) -> Self:
        if self._live:
            self._on_exit.enter_context(on_exit(_show_cursor))
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._on_exit.close()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done. The first one compiles, so it does not count for the time left."""
        if self._timed_from is None:
            self.time_from(step)
        epoch = (step - 1) // self._steps_per_epoch + 1
        self._bar.update(self._task, completed=step, epoch=epoch)

    def time_from(self, step: int) -> None:
        """Estimate the time left from the steps after `step`: what came before it included a compilation."""
        self._timed_from = step, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of training metrics."""
        text = f"loss {row['loss']:.4f}  top-1 {100 * row['top1']:5.1f} %  lr {row['learning_rate']:.4f}"
        if "images_per_second" in row:
            text += f"  {row['images_per_second']:.0f} images/s"
        if row.get("data_wait", 0) > 0.05:
            text += f" ({100 * row['data_wait']:.0f} % waiting for data)"
        self._bar.update(self._task, text=text)
        if not self._live:
            line = f"epoch {row['epoch']:.1f}  step {row['step']}/{self._total}  {text}"
            left = self._seconds_left(row["step"])
            self.note(line if left is None else f"{line}  {duration(left)} left")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False)
        if sys.stdout is not None:  # closed by the shell
            sys.stdout.flush()

    def _seconds_left(self, step: int) -> float | None:
        """Return the estimated time of the steps after `step`; None if no step has been timed."""
        if self._timed_from is None:
            return None
        first, start = self._timed_from
        return None if step <= first else (time.monotonic() - start) / (step - first) * (self._total - step)


def duration(seconds: float) -> str:
    """Format seconds: `95` -> `1:35`, `3700` -> `1:01:40`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class _Console(Console):
    """A console that tolerates a broken pipe while a run is being stopped, since Ctrl-C also stops `tee`."""

    def on_broken_pipe(self) -> None:
        """End the process, unless a stop was requested; then print no more."""
        time.sleep(0.2)  # the same Ctrl-C may be on its way
        try:
            super().on_broken_pipe()
        except SystemExit:
            if requested() is None:
                raise


def _show_cursor() -> None:
    """Show the cursor again, as the bar does at its end, but without its console's lock, which may be held."""
    os.write(1, b"\n\x1b[?25h")
