"""Claim: a run with its workdir in a bucket leaves the same files and survives the same faults as one in a folder."""

import json
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load

import repvgg_jax as rv
from tests.helpers.buckets import free_port
from tests.helpers.repository import ROOT
from tests.helpers.runs import environment, without_times

pytestmark = pytest.mark.slow


def weights(bucket, workdir, name="final"):
    tensors = load((bucket / f"{workdir}/{name}.safetensors").read_bytes())
    return {key: array.tobytes() for key, array in tensors.items()}


def rows(bucket, workdir):
    return [json.loads(line) for line in (bucket / f"{workdir}/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def local_rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluations(rows):
    return [row for row in without_times(rows) if "form" in row]


def complete(bucket, workdir):
    return sorted(int(path.parent.name) for path in (bucket / workdir).glob("checkpoints/*/commit_success.txt"))


def wait_for_checkpoint(bucket, workdir, process):
    deadline = time.monotonic() + 250
    while not complete(bucket, workdir):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.3)


@pytest.fixture(scope="session")
def of_folder(uninterrupted):
    """The tensors and rows that a run in a folder leaves."""
    tensors = {name: load((uninterrupted / f"{name}.safetensors").read_bytes()) for name in ("final", "deploy", "ema")}
    return {name: {k: v.tobytes() for k, v in ts.items()} for name, ts in tensors.items()}, local_rows(uninterrupted)


def test_a_run_leaves_the_same_in_a_bucket_also_after_sigkill(bucket, runs, of_folder):
    """The run is killed at a random point after its first checkpoint."""
    expected_weights, expected_rows = of_folder
    workdir = f"{bucket.url}/run [1]"
    process = runs.start(workdir, ema_decay=0.99)
    wait_for_checkpoint(bucket, "run [1]", process)
    process.kill()
    process.communicate()
    assert not (bucket / "run [1]/final.safetensors").exists()
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    for name, tensors in expected_weights.items():
        assert weights(bucket, "run [1]", name) == tensors
    assert evaluations(rows(bucket, "run [1]")) == evaluations(expected_rows)
    assert [row["step"] for row in rows(bucket, "run [1]")] == [row["step"] for row in expected_rows]
    left = {path.name for path in (bucket / "run [1]").iterdir()}
    events = {name for name in left if name.startswith("events.out.tfevents.")}
    assert events
    assert left - events == {
        *("config.json", "metrics.jsonl", "curves.png", "checkpoints"),
        *(f"{name}.safetensors" for name in ("final", "deploy", "ema", "ema_deploy")),
    }
    steps = [int(path.name) for path in (bucket / "run [1]/checkpoints").iterdir()]
    assert sorted(steps) == complete(bucket, "run [1]"), "no half-written checkpoint is left"
    assert len(steps) <= 3
    model, variables = rv.load_weights(f"{workdir}/final.safetensors")
    assert rv.load_weights(f"{workdir}/deploy.safetensors")[0].deploy
    assert model.num_classes == 10
    assert variables["params"]
    assert rv.load_weights(workdir)[0].num_classes == 10


def test_a_bucket_that_starts_refusing_writes_keeps_the_last_good_checkpoint(bucket, runs, of_folder):
    """A few objects of the second checkpoint are written, then all writes fail."""
    allowed = iter(range(5))

    def refuses(method, about):
        return method in ("PUT", "POST") and "run/checkpoints/20/" in about and next(allowed, None) is None

    bucket.proxy.refuses = refuses
    workdir = f"{bucket.url}/run"
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    line = f"error: cannot write the checkpoint of step 22 or the one before to {workdir}/checkpoints: "
    assert done.stderr.startswith(line)
    assert "Errno" not in done.stderr
    assert done.stderr.rstrip().endswith("the checkpoint of step 10 is kept")
    assert complete(bucket, "run") == [10]
    assert {path.name for path in (bucket / "run/checkpoints").iterdir()} == {"10", "20"}
    bucket.proxy.refuses = lambda method, about: False
    done = runs.finish(workdir, ema_decay=0.99)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 10" in done.stdout
    assert weights(bucket, "run") == of_folder[0]["final"]


def test_two_processes_can_share_only_the_bucket(bucket, runs, tmp_path):
    """Each process has its own data folder and temporary folder; both resume after both were killed."""
    workdir = f"{bucket.url}/two"

    def start(number, port):
        folder = tmp_path / f"process {number}"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        command = runs.command(workdir, coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=number)
        command[command.index("--data-dir") + 1] = str(folder / "data")
        return subprocess.Popen(
            command,
            env=environment(2, folder / "cache") | {"TMPDIR": str(folder / "tmp")},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    port = free_port()
    processes = [start(number, port) for number in range(2)]
    wait_for_checkpoint(bucket, "two", processes[0])
    for process in processes:
        process.kill()
        process.communicate()
    port = free_port()
    processes = [start(number, port) for number in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming at step" in outputs[0][0]
    whole = runs.finish(tmp_path / "one", 4)
    assert whole.returncode == 0, whole.stderr
    expected = load((tmp_path / "one" / "final.safetensors").read_bytes())
    for key, tensor in load((bucket / "two/final.safetensors").read_bytes()).items():
        np.testing.assert_allclose(tensor, expected[key], rtol=5e-2, atol=5e-3, err_msg=key)
    assert [row["step"] for row in rows(bucket, "two")] == [row["step"] for row in local_rows(tmp_path / "one")]
