"""Claim: mixup and CutMix on the device equal timm's, with lambda drawn as in the papers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from train.mixing import blend_with_partner, mix, outside_rectangle

mixing = pytest.importorskip("timm.data.mixup")

N, H, W, CLASSES = 6, 12, 10, 5
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, H, W, 3)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, N)
TARGETS = np.eye(CLASSES, dtype=np.float32)[LABELS] * 0.9 + 0.1 / CLASSES
ON_DEVICE = jnp.asarray(IMAGES), jnp.asarray(TARGETS)


@functools.cache
def compiled(**alphas: float) -> Any:
    return jax.jit(functools.partial(mix, **alphas))


def draw(seed: int, **alphas: float) -> tuple[np.ndarray, np.ndarray]:
    images, targets = compiled(**alphas)(jax.random.key(seed), *ON_DEVICE)
    return np.asarray(images), np.asarray(targets)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_mixup_equals_timms(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = mixing.Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (share, False))
    expected = reference(torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy()), torch.tensor(LABELS))
    images, targets = blend_with_partner(*ON_DEVICE, share)
    np.testing.assert_allclose(images, expected[0].numpy().transpose(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(targets, expected[1].numpy(), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("center", [(5, 4), (0, 0), (11, 9), (3, 9)])
def test_cutmix_equals_timms(share: float, center: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = mixing.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (share, True))
    places = iter(center)
    monkeypatch.setattr(mixing.np.random, "randint", lambda *arguments, **options: next(places))
    expected = reference(torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy()), torch.tensor(LABELS))
    images, targets = blend_with_partner(*ON_DEVICE, outside_rectangle(IMAGES.shape, share, jnp.array(center)))
    np.testing.assert_array_equal(images, expected[0].numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(targets, expected[1].numpy(), atol=1e-6)


MODES: list[dict[str, Any]] = [
    dict(mixup_alpha=0.2),
    dict(cutmix_alpha=1.0),
    dict(mixup_alpha=0.2, cutmix_alpha=1.0),
]


@pytest.mark.parametrize("alphas", MODES)
def test_target_sums_and_the_average_pixel_are_unchanged(alphas: dict[str, float]) -> None:
    for seed in range(20):
        images, targets = draw(seed, **alphas)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(targets.sum(0), TARGETS.sum(0), atol=1e-5)
        np.testing.assert_allclose(images.sum((0, 1, 2)), IMAGES.sum((0, 1, 2)), atol=1e-3)
        assert images.dtype == targets.dtype == np.float32


@pytest.mark.parametrize("alphas", MODES)
def test_mixing_is_a_function_of_the_key_with_and_without_jit(alphas: dict[str, float]) -> None:
    results = [draw(seed, **alphas) for seed in (0, 1, 2, 0)]
    assert len({targets.tobytes() for _, targets in results}) == 3
    images, targets = mix(jax.random.key(0), *ON_DEVICE, **alphas)
    for again in (results[0], results[3]):
        np.testing.assert_allclose(images, again[0], atol=1e-6)
        np.testing.assert_allclose(targets, again[1], atol=1e-6)


def test_alpha_0_changes_nothing() -> None:
    images, targets = mix(jax.random.key(0), *ON_DEVICE)
    assert images is ON_DEVICE[0]
    assert targets is ON_DEVICE[1]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    images = jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1)  # mixed, the second becomes lambda
    keys = jax.random.split(jax.random.key(0), 4000)
    mixed = jax.jit(jax.vmap(lambda key: mix(key, images, jnp.eye(2), mixup_alpha=alpha)))(keys)
    shares = np.asarray(mixed[0][:, 1, 0, 0, 0])
    np.testing.assert_allclose(np.asarray(mixed[1][:, 1, 1]), shares, atol=1e-6)
    expected = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    for level in np.linspace(0.05, 0.95, 10):
        assert abs((shares < level).mean() - (expected < level).mean()) < 0.03
    assert np.isfinite(shares).all()


def test_cutmix_pastes_rectangles_anywhere_and_weights_targets_by_area() -> None:
    images, targets = jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 16, 16, 1)), jnp.eye(2)
    keys = jax.random.split(jax.random.key(1), 1500)
    mixed, labels = (
        np.asarray(a) for a in jax.jit(jax.vmap(lambda key: mix(key, images, targets, cutmix_alpha=1.0)))(keys)
    )
    pasted = mixed[:, 0, :, :, 0]
    np.testing.assert_allclose(pasted.mean((1, 2)), labels[:, 0, 1], atol=1e-6)
    for image in pasted:
        rows, columns = image.any(1), image.any(0)
        assert np.array_equal(image, np.outer(rows, columns))
    often = pasted.mean(0)
    assert often.min() > 0.1, "even in the corners"
    assert abs(often - often[::-1, ::-1]).max() < 0.08


def test_both_are_drawn_equally_often() -> None:
    keys = jax.random.split(jax.random.key(2), 800)
    images = jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 8, 8, 1))
    drawn = jax.jit(jax.vmap(lambda key: mix(key, images, jnp.eye(2), mixup_alpha=0.5, cutmix_alpha=1.0)[0]))
    mixed = drawn(keys)
    values = np.asarray(mixed)[:, 0]
    blended = ((values > 1e-6) & (values < 1 - 1e-6)).any((1, 2, 3))
    assert 0.42 < blended.mean() < 0.58


def test_bfloat16_stays_bfloat16() -> None:
    images, targets = compiled(mixup_alpha=0.2)(jax.random.key(0), ON_DEVICE[0].astype(jnp.bfloat16), ON_DEVICE[1])
    assert (images.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)


def test_integers_and_negative_alphas_are_errors() -> None:
    with pytest.raises(ValueError, match="normalised floats"):
        mix(jax.random.key(0), jnp.zeros((2, 4, 4, 3), jnp.uint8), jnp.eye(2), mixup_alpha=0.2)
    with pytest.raises(ValueError, match="at least 0"):
        mix(jax.random.key(0), *ON_DEVICE, mixup_alpha=-0.2)
