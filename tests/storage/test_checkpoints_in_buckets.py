"""Claim: checkpoints in a bucket are complete or absent, kept and read like those in a folder, also by orbax itself."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import repvgg_jax as rv
from train.checkpoint import Checkpoints, RunFacts
from train.parallel import replicate, to_host
from train.state import TrainState

FACTS = RunFacts(seed=0, batch_size=4, train_images=8, devices=4)


def state_at(step: int) -> TrainState:
    noise = np.random.default_rng(step).normal(size=2000).astype(np.float32)
    return TrainState(
        jnp.asarray(step, jnp.int32), {"kernel": jnp.asarray(noise)}, {"mean": jnp.zeros(2)}, (jnp.ones(3),)
    )


def save(workdir, steps, keep=2, top1=None):
    top1 = top1 or {}
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(replicate(state_at(step)), FACTS, top1.get(step))


def restored(workdir, notes=None):
    with Checkpoints(workdir, 2, print if notes is None else notes.append) as checkpoints:
        state = to_host(checkpoints.restore(state_at(0), FACTS))
    np.testing.assert_array_equal(state.params["kernel"], state_at(int(state.step)).params["kernel"])
    return int(state.step)


def names(workdir):
    return [path.name for path in (workdir / "checkpoints").iterdir()]


def test_the_newest_and_the_best_are_kept_across_resumptions(bucket):
    workdir = bucket / "lr=[0.1]"
    save(workdir, range(1, 6), top1={1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1})
    assert names(workdir) == ["3", "4", "5"]
    assert restored(workdir) == 5
    save(workdir, (6, 7), top1={6: 0.8})
    assert names(workdir) == ["3", "6", "7"]
    save(workdir, (8, 9), top1={9: 0.95})
    assert names(workdir) == ["8", "9"]


def test_the_objects_are_those_of_a_folder_and_the_last_marks_it_complete(bucket, tmp_path):
    save(tmp_path, (1,), top1={1: 0.5})
    bucket.proxy.requests.clear()
    save(bucket / "run", (1,), top1={1: 0.5})
    in_bucket = {path.key.rpartition("checkpoints/")[2] for path in (bucket / "run").files()}
    in_folder = {
        path.relative_to(tmp_path / "checkpoints").as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }

    def fixed(paths):  # tensorstore gives its data files random names
        return {path for path in paths if "/d/" not in path}

    assert fixed(in_bucket) == fixed(in_folder)
    assert "1/commit_success.txt" in in_bucket
    writes = [about for method, about in bucket.proxy.requests if method in ("PUT", "POST")]
    of_marker = [number for number, about in enumerate(writes) if about.rstrip("}").count("1/commit_success.txt")]
    assert of_marker[-1:] == [len(writes) - 1]


@pytest.mark.parametrize("bucket_of", ["gs"])
def test_orbax_reads_them_itself(bucket, bucket_of):
    """With tensorstore's own driver for Google Cloud Storage; orbax has none for S3."""
    if not bucket.url.startswith(bucket_of):
        pytest.skip("orbax cannot read s3:// itself")
    save(bucket / "run", (3, 4), top1={3: 0.5})
    with ocp.CheckpointManager(epath.Path(f"{bucket.url}/run/checkpoints")) as manager:
        assert sorted(manager.all_steps()) == [3, 4]
        saved = manager.restore(4, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    np.testing.assert_array_equal(saved["params"]["kernel"], state_at(4).params["kernel"])


@pytest.mark.parametrize("objects", [0, 1, 4, 9])
def test_a_checkpoint_cut_short_anywhere_is_ignored_and_replaced(objects, bucket):
    workdir = bucket / "run"
    save(workdir, (1,))
    allowed = iter(range(objects))
    bucket.proxy.refuses = lambda method, about: (
        method in ("PUT", "POST") and "checkpoints/2/" in about and next(allowed, None) is None
    )
    with pytest.raises(rv.RepVGGError) as caught:
        save(workdir, (2,))
    bucket.proxy.refuses = lambda method, about: False
    message = str(caught.value)
    assert message.startswith(f"cannot write the last checkpoint to {workdir}/checkpoints: ")
    assert message.endswith("; the checkpoint of step 1 is kept")
    assert "\n" not in message
    assert len(message) < 500
    assert restored(workdir) == 1
    assert names(workdir) == ["1"]
    save(workdir, (2,))
    notes = []
    assert restored(workdir, notes) == 2, notes


def test_a_removal_cut_short_leaves_nothing_that_looks_complete(bucket):
    workdir = bucket / "run"
    save(workdir, (1, 2))
    allowed = iter(range(2))
    bucket.proxy.refuses = lambda method, about: method == "DELETE" and next(allowed, None) is None
    with pytest.raises(rv.RepVGGError, match="the checkpoint of step 3 is kept"):
        save(workdir, (3,))
    bucket.proxy.refuses = lambda method, about: False
    assert names(workdir) == ["1", "2", "3"]
    assert restored(workdir) == 3
    assert names(workdir) == ["2", "3"]


def test_a_damaged_checkpoint_is_set_aside_for_the_previous_one(bucket):
    workdir, notes = bucket / "run", []
    save(workdir, (1, 2))
    largest = max((workdir / "checkpoints/2").files().items(), key=lambda item: item[1])[0]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    assert restored(workdir, notes) == 1
    assert names(workdir) == ["1", "2.damaged"]
    assert any(f"{workdir}/checkpoints/2 is now 2.damaged" in note for note in notes)


def test_a_failed_read_does_not_mark_a_checkpoint_as_damaged(bucket):
    workdir = bucket / "run"
    save(workdir, (1, 2))
    with Checkpoints(workdir, 2) as checkpoints:
        bucket.proxy.refuses = lambda method, about: method == "GET" and "ocdbt" in about and "list-type" not in about
        with pytest.raises(rv.RepVGGError, match=rf"^cannot read {workdir}/checkpoints/2: \S"):
            checkpoints.restore(state_at(0), FACTS)
    bucket.proxy.refuses = lambda method, about: False
    assert names(workdir) == ["1", "2"]
    assert restored(workdir) == 2
