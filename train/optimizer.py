"""SGD with weight decay before momentum, and a cosine schedule that is updated every step."""

from collections.abc import Callable, Collection

import jax
import optax

from repvgg_jax.net.variants import Variant

from .recipe import OptimizerOptions

REFERENCE_BATCH = 256
"""Global batch size that the recipes' learning rates refer to."""


def learning_rate_schedule(options: OptimizerOptions, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0, then a cosine to 0 at the last step.

    The peak is scaled linearly with the global batch (paper section 4.1: 0.1 at 256).
    """
    peak = options.learning_rate * options.batch_size / REFERENCE_BATCH
    warmup, total = round(options.warmup_epochs * steps_per_epoch), options.epochs * steps_per_epoch
    cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])


def decay_mask(params: optax.Params) -> optax.Params:
    """Return True for parameters with weight decay: convolution and linear kernels, identity branches' BN scales."""
    return _mask(params, lambda *path: path[-1] == "kernel" or path[-2:] == ("rbr_identity", "scale"))


def make_optimizer(
    options: OptimizerOptions,
    schedule: optax.Schedule,
    *,
    head_learning_rate: float = 1.0,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """Return the optimizer, which is `torch.optim.SGD`.

    Weight decay is added to the gradient before momentum, and the learning rate scales the momentum buffer. If
    `options.clip_norm` is set, gradients are first clipped to that global norm.

    Args:
      options: options of the recipe.
      schedule: learning rate by step.
      head_learning_rate: factor on the learning rate of the classifier and the auxiliary heads.
      frozen: names of blocks that are not updated, from `frozen_blocks`.
    """
    parts = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    parts += [
        optax.add_decayed_weights(options.weight_decay, mask=decay_mask),
        optax.trace(decay=options.momentum, nesterov=options.nesterov),
        optax.scale_by_learning_rate(schedule),
    ]
    if head_learning_rate != 1:
        parts.append(optax.masked(optax.scale(head_learning_rate), head_mask))
    if frozen:
        parts.append(optax.masked(optax.set_to_zero(), lambda params: _mask(params, lambda *path: path[0] in frozen)))
    return optax.chain(*parts)


def frozen_blocks(variant: Variant, count: int) -> frozenset[str]:
    """Return the names of the blocks in the first `count` of the five stages; RepVGGplus's two half-stages are one."""
    return frozenset(block.name for block in variant.blocks() if block.stage_number < count)


def head_mask(params: optax.Params) -> optax.Params:
    """Return True for the parameters of the classifier and the auxiliary heads."""
    return _mask(params, lambda *path: path[0] == "linear" or path[0].endswith("_aux"))


def _mask(params: optax.Params, chosen: Callable[..., bool]) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen(*(key.key for key in path)), params)
