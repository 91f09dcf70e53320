"""scikit-learn's digits: 1797 real 8x8 scans, with a fixed split into training and test images."""

import numpy as np

from .errors import DataError

TEST_IMAGES = 360
# Statistics of the training images' pixels, scaled to 0..1.
MEAN, STD = 0.306, 0.376


def scans() -> tuple[np.ndarray, np.ndarray]:
    """Return all scans, uint8 `[1797, 8, 8]` in 0..255, and their labels, int `[1797]`.

    Raises:
      DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits data set needs scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return pixels, labels


def held_out(labels: np.ndarray, count: int = TEST_IMAGES) -> np.ndarray:
    """Return the indices of a fixed stratified random sample of `count` examples.

    Args:
      labels: int `[N]`.
      count: size of the sample. Each class contributes its share, rounded by largest remainder.

    Returns:
      int `[count]`, ascending.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    chosen = np.floor(shares).astype(int)
    chosen[np.argsort(chosen - shares, kind="stable")[: count - chosen.sum()]] += 1
    # The streams of RandomState never change (NEP 19). Those of a Generator may.
    random = np.random.RandomState(0)
    picks = [random.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, chosen, strict=True)]
    return np.sort(np.concatenate(picks))


def training_scans() -> np.ndarray:
    """Return the scans that are not held out for testing, uint8 `[1437, 8, 8]`.

    Raises:
      DataError: scikit-learn is not installed.
    """
    images, labels = scans()
    return images[np.setdiff1d(np.arange(len(labels)), held_out(labels))]
