"""Claim: of two runs with one workdir in a bucket, the second is refused while the first is alive, and no longer."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

import repvgg_jax as rv
from tests.helpers.repository import ROOT
from train import bucket_claim
from train.bucket_claim import BucketClaim
from train.recipe import Recipe
from train.workdir import LOCK, claimed

HOLDER = textwrap.dedent(
    """
    import sys
    from repvgg_jax.paths import place
    from train import bucket_claim
    from train.recipe import Recipe
    from train.workdir import claimed
    bucket_claim.BEAT_SECONDS = 0.2
    with claimed(Recipe(), place(sys.argv[1])):
        print("claimed", flush=True)
        sys.stdin.read()
    """
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bucket_claim, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(bucket_claim, "PATIENCE_SECONDS", 3)


def claim_of(workdir):
    return json.loads((workdir / LOCK).read_text(encoding="utf-8"))


def test_a_second_run_is_refused_until_the_first_is_killed(bucket):
    workdir = bucket / "run [1]"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        config = (workdir / "config.json").read_bytes()
        with pytest.raises(rv.ConfigError, match=rf"in use by process {process.pid} on \S+: wait for it"):
            claimed(Recipe(), workdir).__enter__()
        assert (workdir / "config.json").read_bytes() == config
    finally:
        process.kill()
        process.communicate()
    assert claim_of(workdir)["pid"] == process.pid, "the claim was not released"
    start = time.monotonic()
    with claimed(Recipe(), workdir):
        assert claim_of(workdir)["pid"] == os.getpid()
    assert time.monotonic() - start < 2, "a dead process on this machine is recognised at once"
    assert not (workdir / LOCK).exists()


def test_another_machines_stale_claim_is_taken_over(bucket):
    workdir = bucket / "run"
    (workdir / LOCK).write_bytes(json.dumps({"pid": 1, "host": "elsewhere", "run": "x", "beat": 5}).encode())
    start = time.monotonic()
    with claimed(Recipe(), workdir):
        assert claim_of(workdir)["pid"] == os.getpid()
    assert time.monotonic() - start > 2.5


def test_a_run_whose_claim_was_taken_over_stops(bucket):
    workdir = bucket / "run"
    with BucketClaim(workdir, LOCK) as claim:
        claim.check()
        other = {"pid": 7, "host": "elsewhere", "run": "other", "beat": 0}
        (workdir / LOCK).write_bytes(json.dumps(other).encode())
        time.sleep(1)
        with pytest.raises(rv.RepVGGError, match=r"taken over by process 7 on elsewhere: this run stops"):
            claim.check()
    assert claim_of(workdir) == other, "the other run's claim is unchanged"


def test_of_two_runs_that_start_at_once_one_gets_the_folder(bucket, monkeypatch):
    workdir = bucket / "run"
    monkeypatch.setattr(
        BucketClaim, "_write", lambda *args, **kwargs: (workdir / LOCK).write_bytes(b'{"run": "other"}')
    )
    with pytest.raises(rv.ConfigError, match="in use by another process"):
        BucketClaim(workdir, LOCK).__enter__()


def test_a_bucket_that_cannot_be_read_is_one_line(bucket):
    bucket.proxy.refuses = lambda method, about: True
    with pytest.raises(rv.RepVGGError, match=rf"^cannot create --workdir {bucket.url}/run: \S") as caught:
        claimed(Recipe(), bucket / "run").__enter__()
    assert "\n" not in str(caught.value)
