"""Winograd's minimal filtering F(m x m, 3x3) in plain JAX: fewer multiplications for stride-1 3x3 convolutions.

An m x m tile of outputs depends on an (m + 2) x (m + 2) tile `d` of inputs: it is `A [(G g G^T) * (B d B^T)] A^T` with
elementwise `*` (Lavin and Gray, arXiv 1509.09308). Summed over input channels, each of the (m + 2)^2 positions is one
matrix product `[tiles, C_in] @ [C_in, C_out]`, which should dominate the time; `G g G^T` is computed once.

Cost per pixel, compared with 9 `C_in` `C_out` multiplications for the direct sum:

| m | multiplications | transformed kernel | transformed inputs and products, written and read again |
|---|---|---|---|
| 2 | 4 `C_in` `C_out` | 16/9 of the kernel | 4 `C_in` + 4 `C_out` numbers |
| 4 | 2.25 `C_in` `C_out` | 4 times the kernel | 2.25 (`C_in` + `C_out`) numbers, and as much for the row passes |

Heights and widths that are not multiples of m are rounded up. The float32 error of one layer, relative to the largest
output, is about that of the direct sum for m = 2, and about 5 times as large for m = 4.
"""

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from ..broadcasting import channelwise

_A, _B = 0.625, 1.5
"""For m = 4 the interpolation points are 0, +-A, +-B and infinity. With 5/8 and 3/2, which are exact in binary, the
rounding error is half of that with the usual 1 and 2. `native/winograd.h` must use the same points."""


def _matrices() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return B^T, G and A^T in the paper's notation, by m; m = 2 interpolates at 0, +-1 and infinity."""
    a, b, aa, bb = _A, _B, _A**2, _B**2
    inputs = {
        2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        4: [
            [aa * bb, 0, -(aa + bb), 0, 1, 0],
            [0, -a * bb, -bb, a, 1, 0],
            [0, a * bb, -bb, -a, 1, 0],
            [0, -b * aa, -aa, b, 1, 0],
            [0, b * aa, -aa, -b, 1, 0],
            [0, aa * bb, 0, -(aa + bb), 0, 1],
        ],
    }
    at_a, at_b = 2 * aa * (aa - bb), 2 * bb * (bb - aa)
    kernels = {
        2: [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        4: [
            [1 / (aa * bb), 0, 0],
            [1 / at_a, a / at_a, aa / at_a],
            [1 / at_a, -a / at_a, aa / at_a],
            [1 / at_b, b / at_b, bb / at_b],
            [1 / at_b, -b / at_b, bb / at_b],
            [0, 0, 1],
        ],
    }
    outputs = {
        2: [[1, 1, 1, 0], [0, 1, -1, -1]],
        4: [
            [1, 1, 1, 1, 1, 0],
            [0, a, -a, b, -b, 0],
            [0, aa, aa, bb, bb, 0],
            [0, a * aa, -a * aa, b * bb, -b * bb, 1],
        ],
    }

    def arrays(by_tile: dict[int, list[list[float]]]) -> dict[int, np.ndarray]:
        return {tile: np.array(rows, np.float64) for tile, rows in by_tile.items()}

    return arrays(inputs), arrays(kernels), arrays(outputs)


_INPUT, _KERNEL, _OUTPUT = _matrices()


def transform_kernel(kernel: np.ndarray, tile: int) -> np.ndarray:
    """Return `G g G^T`, computed in float64 and rounded once.

    Args:
      kernel: `[3, 3, I, O]`.
      tile: m, 2 or 4.

    Returns:
      `[(m + 2)^2, I, O]` in the kernel's dtype.
    """
    both = np.kron(_KERNEL[tile], _KERNEL[tile])
    inner = kernel.reshape(9, -1).astype(np.float64)
    return (both @ inner).astype(kernel.dtype).reshape(-1, *kernel.shape[2:])


def winograd(x: Array, transformed: Array, bias: Array, *, tile: int, groups: int, relu: bool) -> Array:
    """Compute a stride-1 3x3 convolution with padding 1, bias and optional ReLU.

    Args:
      x: `[N, H, W, C_in]`.
      transformed: `[groups, (m + 2)^2, C_in // groups, C_out // groups]`, from `transform_kernel`.
      bias: `[C_out]`.
      tile: m, 2 or 4.
      groups: groups of the convolution.
      relu: whether to apply ReLU.

    Returns:
      `[N, H, W, C_out]`.
    """
    n, height, width, _ = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    positions = _transform_input(x, tile, rows, columns)
    products = [_grouped_dot(v.reshape(n * rows * columns, -1), transformed[:, p]) for p, v in enumerate(positions)]
    tiles = [product.reshape(n, rows, columns, -1) for product in products]
    y = _transform_output(tiles, bias, tile, relu, exact=rows * tile == height and columns * tile == width)
    return y[:, :height, :width]


def _grouped_dot(x: Array, kernel: Array) -> Array:
    """Return the grouped product `[T, C_in] x [groups, C_in // groups, C_out // groups] -> [T, C_out]`."""
    parts = jnp.split(x, kernel.shape[0], axis=1)
    return jnp.concatenate([part @ kernel[group] for group, part in enumerate(parts)], axis=1)


def _transform_input(x: Array, tile: int, rows: int, columns: int) -> list[Array]:
    """Return `B d B^T` of every tile: (m + 2)^2 arrays `[N, rows, columns, C]`.

    The result of the row pass is written to memory (as one concatenation, which XLA does not fuse further), so the
    column pass reads 3 to 4 numbers for each one that it writes, instead of 9 to 16.
    """
    n, height, width, channels = x.shape
    size = tile + 2
    x = jnp.pad(x, ((0, 0), (1, 1 + rows * tile - height), (1, 1 + columns * tile - width), (0, 0)))
    taps = [x[:, i : i + (rows - 1) * tile + 1 : tile] for i in range(size)]
    passed = jnp.concatenate([_combine(row, taps)[None] for row in _INPUT[tile]])

    def column_taps(i: int) -> list[Array]:
        return [
            lax.slice(
                passed,
                (i, 0, 0, j, 0),
                (i + 1, n, rows, j + (columns - 1) * tile + 1, channels),
                (1, 1, 1, tile, 1),
            )[0]
            for j in range(size)
        ]

    return [_combine(column, column_taps(i)) for i in range(size) for column in _INPUT[tile]]


def _transform_output(tiles: list[Array], bias: Array, tile: int, relu: bool, *, exact: bool) -> Array:
    """Return `A m A^T` of every tile, plus bias.

    Converts (m + 2)^2 arrays `[N, rows, columns, C]` to `[N, rows * m, columns * m, C]`.
    If the result is cropped afterwards (not `exact`), the outputs are first gathered position by position: XLA fuses
    the crop with the operations before it, and would otherwise evaluate every position for every pixel.
    """
    n, rows, columns, channels = tiles[0].shape
    size = tile + 2
    passed = [[_combine(row, tiles[j::size]) for j in range(size)] for row in _OUTPUT[tile]]

    def outputs(p: int, q: int) -> Array:
        y = _combine(_OUTPUT[tile][q], passed[p]) + channelwise(bias)
        return jnp.maximum(y, 0) if relu else y

    grid = [[outputs(p, q) for q in range(tile)] for p in range(tile)]
    if exact:
        y = jnp.stack([jnp.stack(line, axis=3) for line in grid], axis=2)
    else:
        stacked = jnp.concatenate([y[None] for line in grid for y in line])
        y = stacked.reshape(tile, tile, n, rows, columns, channels).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(n, rows * tile, columns * tile, channels)


def _combine(coefficients: np.ndarray, terms: list[Array]) -> Array:
    """Return a linear combination, without multiplications for the coefficients 0 and +-1."""
    total = None
    for coefficient, term in zip(coefficients.tolist(), terms, strict=True):
        if coefficient == 0:
            continue
        scaled = term if abs(coefficient) == 1 else abs(coefficient) * term
        if total is None:
            total = scaled if coefficient > 0 else -scaled
        else:
            total = total + scaled if coefficient > 0 else total - scaled
    if total is None:
        raise ValueError("every coefficient is zero")
    return total
