"""RepVGG in your own training loop: create or load a net, train it with optax, fuse it, predict.

`python -m examples.use_in_your_code [WEIGHTS]` trains on scikit-learn's digits for a few dozen steps. WEIGHTS is any
training-form file that `rv.load_weights` reads; without it, a small net is trained from random weights.
"""

if __name__ == "__main__":  # before the slow imports: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("examples.use_in_your_code")

import sys

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import repvgg_jax as rv

STEPS, BATCH = 60, 32
SMALL = rv.Variant(num_blocks=(1, 1, 1, 1), widths=(16, 16, 32, 64, 128))


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1797 scanned digits, float32 `[N, 32, 32, 3]` with mean 0 and deviation 1, and their labels `[N]`."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8).repeat(4, axis=1).repeat(4, axis=2)
    images = (images - images.mean()) / images.std()
    return np.repeat(images[..., None], 3, axis=-1).astype(np.float32), labels


def main() -> None:
    """Run the example, in the order of the authors' README."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    images, labels = real_digits()

    # Create or load. If the file has another number of classes, `num_classes` adds a newly initialised classifier.
    if len(sys.argv) > 1:
        model, variables = rv.load_weights(sys.argv[1], num_classes=10)
        if model.deploy:
            raise rv.WeightsError(f"{sys.argv[1]} is in deploy form, which cannot be trained; give the training form")
    else:
        model = rv.create_model(SMALL, num_classes=10)
        variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    params, batch_stats = variables["params"], variables["batch_stats"]

    # Train: BatchNorm's running statistics are part of the result.
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)
    optimizer_state = optimizer.init(params)

    @jax.jit
    def train_step(params, batch_stats, optimizer_state, images, labels):
        def loss_of(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates["batch_stats"]

        (loss, batch_stats_after), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), batch_stats_after, optimizer_state, loss

    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        chosen = rng.integers(0, 1437, BATCH)  # the first four fifths; the others are for testing
        params, batch_stats, optimizer_state, loss = train_step(
            params, batch_stats, optimizer_state, images[chosen], labels[chosen]
        )
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")

    # Fuse and compare. `to_deploy` does not change its inputs.
    variables = {"params": params, "batch_stats": batch_stats}
    deploy_model, deploy_variables = rv.to_deploy(model, variables)
    logits = jax.jit(model.apply)(variables, images[1437:])
    fused_logits = jax.jit(deploy_model.apply)(deploy_variables, images[1437:])
    difference = np.linalg.norm(logits - fused_logits) / np.linalg.norm(logits)
    print(f"relative difference between the two forms: {difference:.1e}")

    # Deploy: compile once, for any number of images.
    predict = rv.make_predictor(deploy_model, deploy_variables, batch_size=32, image_size=32)
    right = np.mean(predict(images[1437:]).argmax(-1) == labels[1437:])
    print(f"{100 * right:.1f} % of {len(labels) - 1437} held-out digits right")
