"""Augmentations of a training crop's pixels: AutoAugment, RandAugment, colour jitter, random erasing.

They are pure functions (pixels, rng, …) -> pixels of uint8 [H, W, C] with 1 or 3 channels. They need OpenCV, and
`train.data.augmentation` imports them only for runs that use one.
"""

from .jitter import color_jitter, random_erasing
from .policies import RANDAUGMENT, REPVGGPLUS, auto_augment, rand_augment

__all__ = ["RANDAUGMENT", "REPVGGPLUS", "auto_augment", "color_jitter", "rand_augment", "random_erasing"]
