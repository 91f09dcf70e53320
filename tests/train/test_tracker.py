"""Claim: with `--tracker wandb` Weights & Biases gets a run's rows, a resumed run continues as the same run there, and
whatever fails there causes one warning and nothing else.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.runs import environment, rows
from train.tracker import Tracker

ROW = {"step": 11, "epoch": 0.5, "loss": 2.0, "form": "train"}


class FakeWandb:
    """Stands in for the package: records its calls, and fails where `broken` says so."""

    url: str | None = None

    def __init__(self, broken: str = ""):
        self.broken, self.started, self.logged, self.exit_codes, self.torn_down = broken, [], [], [], 0

    def _fail_in(self, name: str) -> None:
        if self.broken == name:
            raise RuntimeError(f"no {name}\ntoday")

    def init(self, **options: Any) -> Any:
        self._fail_in("init")
        self.started.append(options)
        self.run = SimpleNamespace(step=0, url=self.url, log=self._log, finish=self._finish)
        return self.run

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._fail_in("log")
        self.logged.append((step, numbers))

    def _finish(self, exit_code: int) -> None:
        self._fail_in("finish")
        self.exit_codes.append(exit_code)

    def teardown(self) -> None:
        self.torn_down += 1
        raise ConnectionResetError


@pytest.fixture
def workdir(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"run": {"seed": 3}}', encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def fake(monkeypatch):
    def put(broken: str = "") -> FakeWandb:
        module = FakeWandb(broken)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def test_rows_have_tensorboards_names_and_the_options_are_the_config(workdir, fake):
    wandb, notes = fake(), []
    with Tracker(workdir, 0, notes.append) as tracker:
        tracker.write(ROW, "test_train")
    assert wandb.logged == [(11, {"test_train/epoch": 0.5, "test_train/loss": 2.0})]
    assert (wandb.exit_codes, notes) == ([0], [])
    assert wandb.started[0]["config"] == {"run": {"seed": 3}}
    assert (wandb.started[0]["name"], wandb.started[0]["resume"]) == ("run", "allow")


def test_the_runs_address_is_printed(workdir, fake):
    wandb, notes = fake(), []
    wandb.url = "https://wandb.test/run"
    Tracker(workdir, 0, notes.append)
    assert notes == ["Weights & Biases: https://wandb.test/run"]


def test_a_resumed_run_keeps_its_id_and_a_new_one_in_the_folder_does_not(workdir, fake):
    wandb = fake()
    for start_step in (0, 20, 40, 0):
        Tracker(workdir, start_step, print)
    ids = [options["id"] for options in wandb.started]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_rows_that_were_sent_are_not_sent_again(workdir, fake):
    wandb = fake()
    tracker = Tracker(workdir, 10, print)
    wandb.run.step = 12
    tracker.write(ROW, "train")
    assert wandb.logged == []
    tracker.write(ROW | {"step": 12}, "train")
    assert [step for step, _ in wandb.logged] == [12]


def test_an_error_in_the_run_is_recorded_as_one(workdir, fake):
    wandb = fake()
    with pytest.raises(ZeroDivisionError), Tracker(workdir, 0, print):
        raise ZeroDivisionError
    assert wandb.exit_codes == [1]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_gives_one_warning_and_ends_the_tracking(broken, workdir, fake):
    wandb, notes = fake(broken), []
    with Tracker(workdir, 0, notes.append) as tracker:
        tracker.write(ROW, "train")
        tracker.write(ROW, "train")
    assert notes == [f"warning: Weights & Biases failed and gets no more of this run: no {broken} today"]
    assert wandb.torn_down == 1


def records(path: Path) -> Iterator[Any]:
    """Yield what W&B has written to a `.wandb` file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> dict[int, dict[str, float]]:
    """Return the numbers by step, from such a file, which must be finished."""
    numbers_by_step, finished = {}, False
    for record in records(path):
        finished |= record.WhichOneof("record_type") == "exit"
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            numbers_by_step[json.loads(items["_step"])] = {
                name: json.loads(v) for name, v in items.items() if "/" in name
            }
    assert finished, path
    return numbers_by_step


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """The real package, writing only to disk."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def has_row(workdir: Path, step: int) -> bool:
    return (workdir / "metrics.jsonl").is_file() and any(row["step"] >= step for row in rows(workdir))


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_the_real_package_has_every_row_of_a_run_interrupted_and_resumed(runs, tmp_path):
    workdir = tmp_path / "run"
    command = runs.command(workdir, epochs=8, tracker="wandb")
    process = subprocess.Popen(
        command,
        env=environment(cache=runs.cache),
        start_new_session=True,  # Ctrl-C reaches the whole group, the package's own process too
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: has_row(workdir, 22), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "state saved" in out
    assert "Weights & Biases" not in out

    done = runs.finish(workdir, epochs=8, tracker="wandb")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert "Weights & Biases" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["test_top1_train_form"] > 0

    name = json.loads((workdir / "wandb.json").read_text(encoding="utf-8"))["id"]
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    first, second = map(history, files)
    assert max(first) < min(second)
    there = first | second
    for row in rows(workdir):
        prefix = f"test_{row['form']}" if "form" in row else "train"
        for key in ("loss", "top1"):
            assert there[row["step"]][f"{prefix}/{key}"] == pytest.approx(row[key], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_run_whose_wandb_process_is_killed_warns_once_and_ends_well(runs, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, epochs=30, evaluate_every=30, tracker="wandb")
    wait_for(lambda: has_row(workdir, 22), process)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True)
    (core,) = (int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line)
    os.kill(core, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("warning: Weights & Biases failed and gets no more of this run") == 1
    assert "Traceback" not in err
    assert max(row["step"] for row in rows(workdir)) == 30 * 22


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_of_two_processes_only_the_first_reports(runs, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    options = dict(tracker="wandb", coordinator_address=address, num_processes=2)
    processes = [runs.start(tmp_path / "run", 2, process_id=number, **options) for number in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert sorted(history(path)) == sorted({row["step"] for row in rows(tmp_path / "run")})
