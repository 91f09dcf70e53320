"""Claim: the segmentation example learns, and fusing its backbone does not change the masks."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from examples import segmentation


@pytest.mark.slow
def test_the_example_runs_end_to_end_with_a_few_steps(tmp_path, capsys):
    before, after = segmentation.run(segmentation.Arguments(steps=3, batch_size=2, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert before == pytest.approx(after, abs=1e-3)
    same, total = (int(word) for word in printed.split("both forms: ")[1].split(" pixels")[0].split(" of "))
    assert same >= 0.999 * total
    assert np.asarray(Image.open(tmp_path / "segmentation.png")).std() > 20


def test_the_ground_truth_has_two_dozen_coins():
    from scipy import ndimage

    image, mask = segmentation.coins()
    labels: Any = ndimage.label(mask)
    sizes = np.bincount(labels[0].ravel())[1:]
    assert (sizes > 500).sum() == 24
    assert image[mask == 1].mean() > image[mask == 0].mean() + 1


@pytest.mark.parametrize("bins", segmentation.BINS)
def test_regions_equal_pytorchs(bins):
    x = np.random.default_rng(0).normal(size=(2, 37, 16, 3)).astype(np.float32)
    theirs = torch.nn.AdaptiveAvgPool2d(bins)(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    ours = jax.jit(segmentation.region_means, static_argnums=1)(x, bins)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_full_example_finds_the_coins(tmp_path):
    before, after = segmentation.run(segmentation.Arguments(out=str(tmp_path)))
    assert before == pytest.approx(after, abs=1e-4)
    assert after > 0.9
