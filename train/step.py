"""The train and evaluation steps: pure functions of one device's share of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from repvgg_jax import QuantizedNet, RepVGG
from repvgg_jax.inference.predictor import Predictor
from repvgg_jax.preprocess import Preprocessing, normalize

from .state import TrainState

Mixing = Callable[[Array, Array, Array], tuple[Array, Array]]
"""`(key, images [N, H, W, C], targets [N, classes]) -> images, targets`."""

DROPOUT_STREAM = 0x64726F70
"""Folded into the step's key for dropout, so that its numbers are independent of those for mixing."""

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def smooth_targets(labels: Array, num_classes: int, smoothing: float = 0.0, dtype: Any = jnp.float32) -> Array:
    """Return one-hot targets with `smoothing` of their mass spread evenly over all classes: `[N] -> [N, classes]`."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=dtype), smoothing)


def correct_at(logits: Array, labels: Array, k: int) -> Array:
    """Return 1.0 where the label is among the `k` largest logits and 0.0 elsewhere, float32 `[N]`."""
    k = min(k, logits.shape[-1])
    top = lax.top_k(logits, k)[1]
    return (top == labels[:, None]).any(-1).astype(jnp.float32)


def training_loss(outputs: Array | dict[str, Array], targets: Array, auxiliary_weight: float) -> Array:
    """Return the mean cross-entropy of the main logits, plus the weighted losses of RepVGGplus's auxiliary heads.

    Each is `torch.nn.CrossEntropyLoss` with soft targets `[N, classes]`.
    """
    if not isinstance(outputs, dict):
        outputs = {"main": outputs}
    losses = {name: optax.softmax_cross_entropy(logits, targets).mean() for name, logits in outputs.items()}
    main = losses.pop("main")
    return main + auxiliary_weight * sum(losses.values(), jnp.zeros_like(main))


def make_train_step(
    model: RepVGG,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    preprocessing: Preprocessing,
    *,
    label_smoothing: float = 0.0,
    auxiliary_weight: float = 0.1,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    seed: int = 0,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return a function that takes one step of SGD.

    The step takes `{"image": uint8 [N, H, W, C], "label": int32 [N]}`. With `axis_name`, gradients and metrics are
    averaged over that axis, while each device keeps its own BN statistics, as in the paper's 8-GPU recipe.

    Args:
      model: training form.
      optimizer: optimizer from `optimizer.make_optimizer`.
      schedule: schedule from `optimizer.learning_rate_schedule`.
      preprocessing: mean and standard deviation of the images.
      label_smoothing: share of the target that is spread over all classes.
      auxiliary_weight: weight of each auxiliary head's loss.
      mixing: mixup and CutMix.
      accumulate: portions into which the device's share is split. Gradients are averaged over them, and each updates
        the BN statistics, as do as many smaller PyTorch batches before one `optimizer.step()`.
      ema_decay: decay of the moving average of parameters and BN statistics; 0 keeps none.
      seed: seed of everything random in the step.
      axis_name: name of the device axis.

    Returns:
      `step(state, batch) -> state, metrics`, with the metrics `loss`, `top1`, `learning_rate` and `gradient_norm`.
    """

    def portion_gradients(state: TrainState, stats: Any, batch: Batch, key: Array) -> tuple[Any, Any, dict[str, Array]]:
        images = normalize(batch["image"], preprocessing)
        targets = smooth_targets(batch["label"], model.num_classes, label_smoothing, model.param_dtype)
        if mixing is not None:
            images, targets = mixing(key, images, targets)

        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            outputs, mutated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, DROPOUT_STREAM)},
            )
            loss = training_loss(outputs, targets, auxiliary_weight)
            return loss, (mutated["batch_stats"], outputs["main"] if isinstance(outputs, dict) else outputs)

        (loss, (stats, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return grads, stats, {"loss": loss, "top1": correct_at(logits, batch["label"], 1).mean()}

    def gradients(state: TrainState, batch: Batch, key: Array) -> tuple[Any, Any, Metrics]:
        if accumulate == 1:
            return portion_gradients(state, state.batch_stats, batch, key)

        def walk(carry: tuple[Any, Any], portion: tuple[Batch, Array]) -> tuple[tuple[Any, Any], Metrics]:
            total, stats = carry
            grads, stats, metrics = portion_gradients(state, stats, *portion)
            return (jax.tree.map(jnp.add, total, grads), stats), metrics

        portions = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), dict(batch))
        start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
        (total, stats), metrics = lax.scan(walk, start, (portions, jax.random.split(key, accumulate)))
        grads = jax.tree.map(lambda g: g / accumulate, total)
        return grads, stats, jax.tree.map(jnp.mean, metrics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        grads, batch_stats, metrics = gradients(state, batch, key)
        # With one device, XLA's CPU backend would copy all gradients to average them.
        if axis_name is not None and lax.axis_size(axis_name) > 1:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        metrics["gradient_norm"] = jnp.asarray(optax.tree.norm(grads))
        averages = {}
        if ema_decay:
            averages = dict(
                ema_params=moving_average(state.ema_params, params, ema_decay, state.step),
                ema_batch_stats=moving_average(state.ema_batch_stats, batch_stats, ema_decay, state.step),
            )
        return TrainState(state.step + 1, params, batch_stats, opt_state, **averages), metrics

    return train_step


def moving_average(average: Any, new: Any, decay: float, step: Array) -> Any:
    """Return `decay * average + (1 - decay) * new`, with `decay` limited to `(1 + step) / (10 + step)`.

    The limit makes the average forget the random initial weights, even in short runs.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: a + (1 - kept) * (b - a), average, new)


def make_eval_step(
    model: RepVGG | QuantizedNet, preprocessing: Preprocessing, *, axis_name: str | None = None
) -> Callable[[Any, Batch], Metrics]:
    """Return a function that evaluates a batch.

    It takes variables and a batch with `"mask" [N]`, 0 for padding, and returns the sums over the batch `"loss"`,
    `"top1"`, `"top5"` and `"images"`, and each image's `"prediction" [N]` with its `"probability" [N]`. With
    `axis_name`, the sums run over that axis too.
    """

    def eval_step(variables: Any, batch: Batch) -> Metrics:
        logits = model.apply(variables, normalize(batch["image"], preprocessing), train=False)
        assert isinstance(logits, Array)
        sums = evaluation_sums(logits, batch["label"], batch["mask"])
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        return sums | {"prediction": logits.argmax(-1), "probability": jax.nn.softmax(logits).max(-1)}

    return eval_step


def predictor_step(predict: Predictor) -> Callable[[Any, Batch], Metrics]:
    """Return the same function for a predictor, which holds its variables and runs on one device."""
    sums_of = jax.jit(evaluation_sums)

    def eval_step(variables: Any, batch: Batch) -> Metrics:
        del variables
        logits = jnp.asarray(predict(np.asarray(batch["image"])[0]))
        sums = sums_of(logits, jnp.asarray(batch["label"])[0], jnp.asarray(batch["mask"])[0])
        return sums | {"prediction": logits.argmax(-1)[None], "probability": jax.nn.softmax(logits).max(-1)[None]}

    return eval_step


def evaluation_sums(logits: Array, labels: Array, mask: Array) -> Metrics:
    """Return the sums `{"loss", "top1", "top5", "images"}` over the images `[N]` whose mask is 1."""
    return {
        "loss": (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * mask).sum(),
        "top1": (correct_at(logits, labels, 1) * mask).sum(),
        "top5": (correct_at(logits, labels, 5) * mask).sum(),
        "images": mask.sum(),
    }
