"""SGD as the recipe runs it: decay before momentum, cosine schedule per step."""

from collections.abc import Callable

import jax
import optax

from .config import FineTuneConfig, OptimizerConfig

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
    return _mask(params, lambda *path: path[-1] == "kernel" or path[-2:] == ("rbr_identity", "scale"))


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, fine_tune: FineTuneConfig | None = None
) -> optax.GradientTransformation:
    """`torch.optim.SGD`: decay is added to the gradient before momentum, the learning rate scales the buffer.

    Gradients are clipped to a global norm before that, where `config` asks for it; `fine_tune` scales the
    classifier's learning rate and holds frozen stages still.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.trace(decay=config.momentum, nesterov=config.nesterov),
        optax.scale_by_learning_rate(schedule),
    ]
    if fine_tune is not None and fine_tune.head_learning_rate != 1:
        parts.append(optax.masked(optax.scale(fine_tune.head_learning_rate), head_mask))
    if fine_tune is not None and fine_tune.freeze_stages:
        frozen = tuple(f"stage{i}" for i in range(fine_tune.freeze_stages))
        parts.append(optax.masked(optax.set_to_zero(), lambda params: stage_mask(params, frozen)))
    return optax.chain(*parts)


def head_mask(params: optax.Params) -> optax.Params:
    """True for the classifier and the auxiliary heads."""
    return _mask(params, lambda *path: path[0] == "linear" or path[0].endswith("_aux"))


def stage_mask(params: optax.Params, stages: tuple[str, ...]) -> optax.Params:
    """True for the blocks of these stages: `stage3` means `stage3_0`, …, and RepVGGplus's two halves."""
    return _mask(params, lambda *path: path[0].split("_")[0] in stages and not path[0].endswith("_aux"))


def _mask(params: optax.Params, chosen: Callable[..., bool]) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen(*(key.key for key in path)), params)
