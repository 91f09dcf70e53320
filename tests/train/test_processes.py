"""Claim: two processes train like one with as many devices, and neither hangs when the other dies."""

import contextlib
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.runs import rows

pytestmark = pytest.mark.slow


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(runs, workdir, **options):
    address = f"127.0.0.1:{free_port()}"
    return [
        runs.start(workdir, 2, coordinator_address=address, num_processes=2, process_id=number, **options)
        for number in range(2)
    ]


def test_two_processes_of_two_devices_train_as_one_process_of_four(runs, tmp_path):
    processes = start_two(runs, tmp_path / "two")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "4 CPU devices in 2 processes" in " ".join(outputs[0][0].split())
    spoken = [line for line in outputs[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert spoken == [], "only the first process prints"
    assert runs.finish(tmp_path / "one", 4).returncode == 0

    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left["step"] == right["step"]
        np.testing.assert_allclose(left["loss"], right["loss"], rtol=2e-3)
        assert left.get("images") == right.get("images")
    first, second = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    for key in first:
        np.testing.assert_allclose(first[key], second[key], rtol=5e-2, atol=5e-3, err_msg=key)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_other_stops(victim, runs, tmp_path):
    processes = start_two(runs, tmp_path / "run", epochs=500)
    deadline = time.monotonic() + 200
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.2)
    processes[victim].kill()
    _, err = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode != 0
    assert "another process of this run has died" in err or "heartbeat" in err or "unavailable" in err.lower(), err
