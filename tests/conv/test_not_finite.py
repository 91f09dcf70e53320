"""Claim: the native convolutions and their gradients treat NaN, infinities and empty batches as XLA's do.

A result is NaN or infinite, with the same sign, exactly where the direct sum's is. Winograd's algorithm computes a tile
of m x m pixels from the same products, so a value that is not finite turns its whole tile into NaN; it never spreads
further, and never becomes finite. In a kernel gradient, which is a sum over tiles, it spreads to all taps of its two
channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.conv import native
from repvgg_jax.conv.algorithm import ALGORITHMS
from repvgg_jax.conv.deploy import convolve, prepare_kernel
from repvgg_jax.conv.native import training
from repvgg_jax.conv.training import training_conv

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

SHAPE = dict(images=2, height=9, width=10, inputs=4, outputs=6)
VALUES = [np.nan, np.inf, -np.inf]


def kinds(array) -> np.ndarray:
    """Return 0 for finite numbers, 1 and -1 for infinities, 2 for NaN."""
    array = np.asarray(array)
    return np.where(np.isnan(array), 2, np.where(np.isinf(array), np.sign(array), 0))


def arrays(seed: int, stride: int, groups: int) -> dict[str, np.ndarray]:
    """Return an image, a kernel and a gradient of the result, all finite."""
    rng = np.random.default_rng(seed)
    n, h, w, i, o = SHAPE.values()
    shapes = dict(x=(n, h, w, i), kernel=(3, 3, i // groups, o), gradient=(n, -(-h // stride), -(-w // stride), o))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=(3, 4))
def by_xla(x, kernel, gradient, stride: int, groups: int):
    """Return the result and both gradients, group by group: XLA's kernel gradient multiplies other groups by zero."""

    def conv(x, kernel):
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    results = []
    for part, weights, cotangent in zip(
        jnp.split(x, groups, 3), jnp.split(kernel, groups, 3), jnp.split(gradient, groups, 3), strict=True
    ):
        y, pull = jax.vjp(conv, part, weights)
        results.append((y, *pull(cotangent)))
    return [jnp.concatenate(parts, 3) for parts in zip(*results, strict=True)]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def natively(x, kernel, gradient, stride: int, groups: int, tile: int):
    """Return the same three from `native.training`."""
    return [
        training.conv(x, kernel, stride, groups, tile),
        training.input_gradient(gradient, kernel, x.shape[1:3], stride, groups, tile),
        training.kernel_gradient(x, gradient, stride, groups, tile),
    ]


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_direct_sums_and_gradients_have_the_nans_and_infinities_of_xla(stride, groups):
    rng = np.random.default_rng(stride)
    for case in range(45):
        inputs = arrays(case, stride, groups)
        changed = inputs[("x", "kernel", "gradient")[case % 3]].reshape(-1)
        changed[rng.choice(changed.size, 1 + case % 2)] = VALUES[case // 3 % 3]
        expected, actual = by_xla(*inputs.values(), stride, groups), natively(*inputs.values(), stride, groups, 0)
        for name, theirs, ours in zip(("result", "to input", "to kernel"), expected, actual, strict=True):
            left, right = kinds(theirs), kinds(ours)
            if name == "to input" and stride == 2 and not np.isfinite(inputs["kernel"]).all():
                # XLA skips what is beyond the gradient's last row and column; we multiply the kernel by zero there.
                np.testing.assert_array_equal(left[:, :-1, :-1], right[:, :-1, :-1])
                assert (right[left != right] == 2).all()
            else:
                np.testing.assert_array_equal(left, right, err_msg=f"{name} of case {case}")


@pytest.mark.parametrize("algorithm", [name for name, algorithm in ALGORITHMS.items() if algorithm.trains])
@pytest.mark.parametrize("relu", [False, True])
def test_deploy_convolutions_keep_nan_and_infinity(algorithm, relu):
    for case in range(30):
        inputs = arrays(case, 1, 2)
        bias = np.linspace(-1, 1, 6).astype(np.float32)
        changed = (inputs["x"], inputs["kernel"], bias)[case % 3].reshape(-1)
        changed[case * 7 % changed.size] = VALUES[case // 3 % 3]
        with np.errstate(invalid="ignore"):
            packed = prepare_kernel(inputs["kernel"], algorithm, groups=2)
        arguments = map(jnp.asarray, (inputs["x"], packed, bias))
        actual = kinds(convolve(*arguments, algorithm=algorithm, groups=2, relu=relu))
        y = by_xla(*inputs.values(), 1, 2)[0] + bias
        expected = kinds(jnp.maximum(y, 0) if relu else y)
        if algorithm == "native" or case % 3 == 2:
            np.testing.assert_array_equal(actual, expected, err_msg=f"case {case}")
        else:
            assert ((actual != 0) >= (expected != 0)).all()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("name", "pixel"),
    [("x", (1, 4, 7, 1)), ("x", (0, 0, 0, 3)), ("gradient", (1, 4, 7, 4)), ("gradient", (0, 8, 9, 0))],
)
def test_winograd_keeps_nan_and_infinity_inside_the_tile(name, pixel, value, tile):
    inputs = arrays(0, 1, 2)
    before = [np.asarray(a) for a in natively(*inputs.values(), 1, 2, tile)]
    inputs[name][pixel] = value
    after = [np.asarray(a) for a in natively(*inputs.values(), 1, 2, tile)]
    for theirs, ours in zip(by_xla(*inputs.values(), 1, 2), after, strict=True):
        assert (~np.isfinite(ours) >= ~np.isfinite(theirs)).all()
    # The tiles that read the pixel, in its image and group; nothing else changes by a bit.
    which = 0 if name == "x" else 1
    image, row, column, channel = pixel
    share, group = before[which].shape[3] // 2, channel // (inputs[name].shape[3] // 2)
    reach = np.zeros(before[which].shape, bool)
    rows, columns = (slice(max(0, at - 1) // tile * tile, (at + 1) // tile * tile + tile) for at in (row, column))
    reach[image, rows, columns, group * share : (group + 1) * share] = True
    np.testing.assert_array_equal(after[which][~reach], before[which][~reach])
    # In the kernel's gradient, only the channel.
    same = np.ones(before[2].shape, bool)
    if name == "x":
        same[:, :, channel % 2, group * 3 : (group + 1) * 3] = False
    else:
        same[..., channel] = False
    np.testing.assert_array_equal(after[2][same], before[2][same])


@pytest.mark.parametrize("tile", [0, 2, 4])
def test_denormal_numbers_and_negative_zeros_are_treated_as_by_xla(tile):
    kernel = np.zeros((3, 3, 16, 16), np.float32)
    kernel[1, 1] = np.eye(16)
    for value in (1e-40, -1e-40, -0.0):
        x = np.full((8, 16, 16, 16), value, np.float32)  # enough tasks for every thread
        for theirs, ours in zip(by_xla(x, kernel, x, 1, 1), natively(x, kernel, x, 1, 1, tile), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("stride", "tile"), [(1, 0), (1, 2), (1, 4), (2, 0)])
@pytest.mark.parametrize("empty", ["batch", "height", "width"])
def test_empty_arrays_are_computed(empty, stride, tile):
    n, h, w = (0 if empty == name else size for name, size in (("batch", 3), ("height", 8), ("width", 10)))
    x, kernel = jnp.zeros((n, h, w, 4)), jnp.ones((3, 3, 4, 5))
    pair: Any = jax.vjp(lambda x, kernel: training.conv(x, kernel, stride, 1, tile), x, kernel)
    y, pull = pair
    assert y.shape == (n, -(-h // stride), -(-w // stride), 5)
    to_x, to_kernel = pull(y)
    assert to_x.shape == x.shape
    np.testing.assert_array_equal(to_kernel, np.zeros(kernel.shape))


def test_the_training_convolution_takes_an_empty_batch():
    def loss(kernel, x):
        return training_conv(x, kernel).sum()

    # In `pmap`, a layer of this size would be computed natively.
    gradient = jax.pmap(jax.grad(loss))(jnp.ones((1, 3, 3, 8, 8)), jnp.zeros((1, 0, 16, 16, 8)))
    np.testing.assert_array_equal(gradient, np.zeros((1, 3, 3, 8, 8)))
