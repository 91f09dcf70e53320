"""SGD as the recipe runs it: decay before momentum, cosine schedule per step."""

import jax
import optax

from .config import OptimizerConfig

REFERENCE_BATCH = 256
"""Global batch that the recipes' learning rates belong to."""


def learning_rate_schedule(config: OptimizerConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then a cosine to 0 at the last step.

    The peak is scaled linearly with the global batch (paper section 4.1: 0.1 at 256).
    """
    peak = config.learning_rate * config.batch_size / REFERENCE_BATCH
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])


def decay_mask(params: optax.Params) -> optax.Params:
    """True where weight decay falls: convolution and linear kernels, and the identity branch's BN scale."""

    def decays(path: tuple, leaf: object) -> bool:
        del leaf
        *_, parent, name = ("", "", *(key.key for key in path))
        return name == "kernel" or (parent == "rbr_identity" and name == "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """`torch.optim.SGD`: decay is added to the gradient before momentum, the learning rate scales the buffer."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.trace(decay=config.momentum, nesterov=config.nesterov),
        optax.scale_by_learning_rate(schedule),
    )
