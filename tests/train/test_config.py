"""Claim: a run goes on only with the options it was started with, whatever version wrote them down."""

import dataclasses
import json

import pytest

import repvgg_jax as rv
from train.config_file import save_or_compare
from train.recipe import Recipe, RunOptions


@pytest.fixture
def workdir(tmp_path):
    """A folder whose run has come to its first checkpoint, and its options."""
    config = Recipe(run=RunOptions(workdir=str(tmp_path)))
    save_or_compare(config, tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path, config


def without(tree, group, name):
    return tree | {group: {key: value for key, value in tree[group].items() if key != name}}


def test_a_run_older_than_an_option_did_what_it_does_by_default(workdir):
    path, config = workdir
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(without(saved, "model", "dropout")), encoding="utf-8")
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    with pytest.raises(rv.RepVGGError, match=r"other options \(dropout 0.0 -> 0.2\)"):
        save_or_compare(changed, path)
    save_or_compare(config, path)
    assert json.loads((path / "config.json").read_text(encoding="utf-8")) == saved


def test_a_changed_option_is_refused_unless_it_moves_no_weight(workdir):
    path, config = workdir
    optimizer = dataclasses.replace(config.optimizer, batch_size=32)
    with pytest.raises(rv.RepVGGError, match=r"other options \(batch_size 256 -> 32\)"):
        save_or_compare(dataclasses.replace(config, optimizer=optimizer), path)
    save_or_compare(dataclasses.replace(config, run=dataclasses.replace(config.run, keep_checkpoints=9)), path)
