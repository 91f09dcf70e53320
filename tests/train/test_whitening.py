"""Claim: `--whiten-stem` gives a first stage whose outputs are uncorrelated over the images, and keeps it frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing, normalize
from train.data import Example
from train.presets import parse
from train.run import fresh_state, make_run, open_data, whitened
from train.whitening import whitening_of

GREY = Preprocessing(image_size=12, crop_fraction=1.0, mean=(0.5,), std=(0.25,))


class Clouds:
    """Smooth images, in which neighbouring pixels are alike; more of them than the whitening reads."""

    def __init__(self, images: int = 4100, channels: int = 3, size: int = 12) -> None:
        self.class_names = ["a"]
        noise = np.random.default_rng(0).normal(size=(images, size + 4, size + 4, channels))
        smooth = sum(noise[:, i : i + size, j : j + size] for i in range(5) for j in range(5)) / 5
        mixed = smooth @ np.random.default_rng(1).normal(size=(channels, channels))
        self.images = np.clip(128 + 40 * mixed, 0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Example:
        return Example(self.images[index], 0, f"cloud {index}")


@pytest.mark.parametrize(("channels", "features"), [(3, 8), (3, 54), (1, 18)])
def test_the_filters_outputs_are_uncorrelated_over_the_images(channels, features):
    clouds = Clouds(channels=channels)
    preprocessing = GREY if channels == 1 else Preprocessing(12, 1.0, (0.4, 0.5, 0.6), (0.25, 0.2, 0.3))
    whitening = whitening_of(clouds, preprocessing, features)
    assert whitening.kernel.shape == (3, 3, channels, features)
    half = features // 2
    np.testing.assert_array_equal(whitening.kernel[..., half:], -whitening.kernel[..., :half])
    x = normalize(clouds.images, preprocessing)
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(whitening.kernel[..., :half]),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = np.asarray(y, np.float64).reshape(-1, half)
    np.testing.assert_allclose(y.mean(0), whitening.mean[:half], atol=0.03 * y[:, 0].std())
    covariance = np.cov(y.T)
    np.testing.assert_allclose(np.diag(covariance), whitening.variance[:half], rtol=0.05, atol=0.006)
    correlation = np.corrcoef(y[:, : half // 2].T)  # of the larger half: the smallest contain the pixels' rounding
    np.testing.assert_allclose(correlation, np.eye(half // 2), atol=0.06)


def run_of(*words):
    recipe = parse(["--preset", "digits", "--whiten-stem", "--widths", "16", "16", "24", "32", "48", *words])
    return make_run(recipe, open_data(recipe))


def start_of(run):
    return whitened(run, fresh_state(run))


@pytest.mark.parametrize(
    "words",
    [
        *(pytest.param(words, marks=pytest.mark.slow) for words in ((), ("--block", "qarepvgg"), ("--no-point",))),
        ("--dense-copies", "2", "--strips"),
        ("--ema-decay", "0.9"),
    ],
)
def test_stage_0_is_the_whitening_convolution_whatever_its_branches(words):
    run = run_of(*words)
    state = start_of(run)
    whitening = whitening_of(run.dataset.train, run.dataset.preprocessing, 16)
    for variables in (state.variables, state.ema_variables if "--ema-decay" in words else state.variables):
        kernel, bias = rv.equivalent_kernel_bias(variables["params"]["stage0"], variables["batch_stats"]["stage0"])
        expected = whitening.kernel / np.sqrt(whitening.variance + 1e-5)
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias, -whitening.mean / np.sqrt(whitening.variance + 1e-5), atol=1e-4)


def test_it_is_the_same_in_every_process_and_for_every_seed():
    one, other = (start_of(run_of("--seed", seed)).params for seed in "12")

    def kernels(block):
        return [params[block]["rbr_dense"]["conv"]["kernel"] for params in (one, other)]

    np.testing.assert_array_equal(*kernels("stage0"))
    assert np.abs(np.subtract(*kernels("stage1_0"))).max() > 0


def test_an_impossible_width_is_named():
    with pytest.raises(rv.ConfigError, match="even number of channels in stage 0, at most 18, not 20: set --widths"):
        whitening_of(Clouds(40, channels=1), GREY, 20)
    with pytest.raises(rv.ConfigError, match="not 7: set --widths, or --no-whiten-stem"):
        whitening_of(Clouds(40, channels=1), GREY, 7)


def test_initial_weights_keep_their_whitening(tmp_path):
    before = start_of(run_of())
    rv.save_weights(tmp_path / "a.safetensors", run_of().model, before.variables, preprocessing=GREY)
    after = start_of(run_of("--init", str(tmp_path / "a.safetensors"), "--data", "digits"))
    jax.tree.map(np.testing.assert_array_equal, before.params["stage0"], after.params["stage0"])
    assert run_of("--init", str(tmp_path / "a.safetensors")).model.frozen_stages == 1
