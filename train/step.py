"""The train and eval steps: pure functions of one device's share of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from repvgg_jax import RepVGG
from repvgg_jax.preprocess import Preprocessing, normalize

from .state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Cross-entropy of each example, `[N, classes], [N] -> [N]` (`torch.nn.CrossEntropyLoss`).

    `smoothing` moves that share of the target evenly onto all classes.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def correct_at(logits: Array, labels: Array, k: int) -> Array:
    """1.0 where the label is among the `k` largest logits, `[N]`."""
    k = min(k, logits.shape[-1])
    top = lax.top_k(logits, k)[1]
    return (top == labels[:, None]).any(-1).astype(jnp.float32)


def training_loss(outputs: Array | dict[str, Array], labels: Array, smoothing: float, auxiliary_weight: float) -> Array:
    """Mean loss of the main logits, plus the weighted losses of RepVGGplus's auxiliary heads."""
    if not isinstance(outputs, dict):
        outputs = {"main": outputs}
    losses = {name: cross_entropy(logits, labels, smoothing).mean() for name, logits in outputs.items()}
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
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One step of SGD.

    The step takes `{"image": uint8 [N, H, W, C], "label": int32 [N]}`. With `axis_name`, gradients and metrics
    are averaged over that axis; BN statistics stay each device's own, as in the paper's 8-GPU recipe.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images = normalize(batch["image"], preprocessing)

        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, mutated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            loss = training_loss(outputs, batch["label"], label_smoothing, auxiliary_weight)
            return loss, (mutated["batch_stats"], outputs["main"] if isinstance(outputs, dict) else outputs)

        (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        metrics = {"loss": loss, "top1": correct_at(logits, batch["label"], 1).mean()}
        if axis_name is not None:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["learning_rate"] = schedule(state.step)
        new_state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
        return new_state, metrics

    return train_step


def make_eval_step(
    model: RepVGG, preprocessing: Preprocessing, *, axis_name: str | None = None
) -> Callable[[Any, Batch], Metrics]:
    """Sums over a batch: `{"loss", "top1", "top5", "images"}`, and each image's `prediction [N]`.

    The step takes variables and a batch with `"mask" [N]`, 0 for padding. With `axis_name` the sums run over
    that axis too.
    """

    def eval_step(variables: Any, batch: Batch) -> Metrics:
        logits = model.apply(variables, normalize(batch["image"], preprocessing), train=False)
        assert isinstance(logits, Array)
        labels, mask = batch["label"], batch["mask"]
        sums = {
            "loss": (cross_entropy(logits, labels) * mask).sum(),
            "top1": (correct_at(logits, labels, 1) * mask).sum(),
            "top5": (correct_at(logits, labels, 5) * mask).sum(),
            "images": mask.sum(),
        }
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        return sums | {"prediction": logits.argmax(-1)}

    return eval_step
