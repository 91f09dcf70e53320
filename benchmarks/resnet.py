"""ResNet-18, -50 and -101 (He et al., CVPR 2016) in deployed form, with BN folded into the convolutions.

RepVGG's throughput on GPUs is compared with them (paper, table 4: A2 with ResNet-50, B1g4 with ResNet-101).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

BLOCKS = {"ResNet-18": (2, 2, 2, 2), "ResNet-50": (3, 4, 6, 3), "ResNet-101": (3, 4, 23, 3)}


class ResNet(nn.Module):
    """`[N, H, W, 3] -> [N, classes]`; basic blocks for ResNet-18, bottlenecks (stride in the 3x3) for the others."""

    name_: str
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bottleneck = self.name_ != "ResNet-18"

        def conv(x: Array, features: int, size: int, stride: int = 1) -> Array:
            padding = size // 2
            module = nn.Conv(features, (size, size), stride, ((padding, padding),) * 2, dtype=self.dtype)
            return module(x)

        x = nn.relu(conv(x, 64, 7, 2))
        x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))  # after ReLU, 0 is the minimum
        for stage, count in enumerate(BLOCKS[self.name_]):
            width = 64 * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                outputs = 4 * width if bottleneck else width
                if bottleneck:
                    y = nn.relu(conv(x, width, 1))
                    y = nn.relu(conv(y, width, 3, stride))
                    y = conv(y, outputs, 1)
                else:
                    y = conv(nn.relu(conv(x, width, 3, stride)), width, 3)
                if y.shape != x.shape:
                    x = conv(x, outputs, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.astype(jnp.float32).mean((1, 2)))
