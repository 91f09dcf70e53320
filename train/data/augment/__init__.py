"""What happens to the pixels of a training crop: AutoAugment, RandAugment, colour jitter, random erasing.

Pure functions (pixels, rng, …) -> pixels of uint8 [H, W, C], 1 or 3 channels. They need OpenCV;
`train.data.augmentation` imports them only for a run that asks for one.
"""

from .jitter import color_jitter, random_erasing
from .policies import RANDAUGMENT, REPVGGPLUS, auto_augment, rand_augment

__all__ = ["RANDAUGMENT", "REPVGGPLUS", "auto_augment", "color_jitter", "rand_augment", "random_erasing"]
