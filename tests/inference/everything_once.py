"""`python -m tests.inference.everything_once {some,all}`: run what the library computes, in the current environment."""

import sys
from typing import Any

import jax
import numpy as np
import optax

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing
from repvgg_jax.quantization.adaround import AdaRoundOptions
from repvgg_jax.quantization.methods import Method
from repvgg_jax.quantization.qat import quantization_aware, quantized_net, with_ranges
from tests.helpers.random_weights import random_variables
from train.mixing import mix
from train.parallel import parallel, put_batch, replicate, to_host
from train.state import create_state
from train.step import make_train_step

SIZE = 8
PREPROCESSING = Preprocessing(SIZE, 1.0, (0.5,) * 3, (0.2,) * 3)
VARIANT = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8))


def main() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, SIZE, SIZE, 3), np.uint8)
    images = rng.normal(size=(16, SIZE, SIZE, 3)).astype(np.float32)
    model = rv.create_model(VARIANT, 5)
    model.init(jax.random.key(0), images[:2])
    variables = random_variables(model)
    expected = np.asarray(model.apply(variables, images))
    deploy_model, deploy_variables = rv.to_deploy(model, variables)
    fused = np.asarray(deploy_model.apply(deploy_variables, images))
    np.testing.assert_allclose(fused, expected, rtol=1e-3, atol=1e-4)
    predict = rv.make_predictor(model, variables, 4, SIZE)
    np.testing.assert_allclose(predict(images), expected, rtol=1e-3, atol=1e-4)
    rv.make_predictor(model, variables, 4, SIZE, preprocessing=PREPROCESSING)(pixels)

    def mixing(key, images, targets):
        return mix(key, images, targets, mixup_alpha=0.2, cutmix_alpha=1.0)

    optimizer, schedule = optax.sgd(0.1), optax.constant_schedule(0.1)
    options: dict[str, Any] = dict(label_smoothing=0.1, mixing=mixing, accumulate=2, ema_decay=0.9)
    step = make_train_step(model, optimizer, schedule, PREPROCESSING, **options, axis_name="batch")
    state = create_state(model, optimizer, 0, (SIZE, SIZE, 3), ema=True, variables=variables)
    batch = put_batch({"image": pixels[None, :4], "label": np.arange(4, dtype=np.int32)[None]})
    state, metrics = parallel(step)(replicate(state), batch)
    assert np.isfinite(to_host(metrics)["loss"])

    net = rv.quantize(model, variables, images, "per-channel")
    predict = rv.make_predictor(quantized=net, batch_size=16)
    assert np.linalg.norm(predict(images) - expected) < 0.2 * np.linalg.norm(expected)
    if "all" in sys.argv:
        rv.quantize(model, variables, images, Method(bias_correction=True, adaround=AdaRoundOptions(2)))
        aware = quantization_aware(model)
        start = with_ranges(variables)
        changed: Any
        _, changed = aware.apply(start, images, train=True, mutable=["batch_stats"])
        quantized_net(aware, start | changed, PREPROCESSING)(images)
    print("done")


if __name__ == "__main__":
    main()
