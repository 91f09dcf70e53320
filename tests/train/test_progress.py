"""Claim: a run's lines show a time left that counts no compilation, and top-5 only where it can be below 100 %."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from train import progress
from train.evaluate import Evaluation
from train.loop import evaluation_text


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=time.sleep))
    return clock


def row(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "loss": 1.0, "top1": 0.5, "learning_rate": 0.1}


def take(run: progress.RunProgress, clock: Clock, steps: range, seconds: float = 1) -> None:
    for step in steps:
        clock.now += seconds
        run.advance(step)


@pytest.mark.parametrize("start", [0, 50], ids=["from the start", "resumed"])
def test_the_time_left_does_not_count_the_first_steps_compilation(
    start: int, clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    with progress.RunProgress(100, 10) as run:
        clock.now += 1000  # opening the data, restoring a checkpoint
        run.start(start)
        take(run, clock, range(start + 1, start + 2), seconds=60)
        take(run, clock, range(start + 2, start + 12))
        run.show(row(start + 11))
    left = progress.duration(100 - start - 11)
    assert capsys.readouterr().out.endswith(f"  {left} left\n")


def test_no_time_is_shown_before_a_step_has_been_timed(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with progress.RunProgress(100, 10) as run:
        run.start(0)
        take(run, clock, range(1, 2), seconds=60)
        run.show(row(1))
        assert capsys.readouterr().out == "epoch 0.1  step 1/100  loss 1.0000  top-1  50.0 %  lr 0.1000\n"
        take(run, clock, range(2, 3))
        run.show(row(2))
        assert "  1:38 left\n" in capsys.readouterr().out


def test_the_time_left_does_not_count_the_first_evaluations_compilation(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    with progress.RunProgress(100, 10) as run:
        run.start(0)
        take(run, clock, range(1, 11))
        clock.now += 60
        run.time_from(10)
        take(run, clock, range(11, 21))
        run.show(row(20))
        assert "  1:20 left\n" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "shows_top5"), [(2, False), (5, False), (6, True), (1000, True)])
def test_top5_is_shown_only_where_it_can_be_below_100_percent(classes: int, shows_top5: bool) -> None:
    none = np.empty(0)
    result = Evaluation(0.75, 1.0, 0.5, 8, 0, predictions=none, probabilities=none, indices=none)
    top5 = ", top-5 100.00 %" if shows_top5 else ""
    assert evaluation_text(result, classes) == f"top-1 75.00 %{top5}, loss 0.5000, 8 test images"
