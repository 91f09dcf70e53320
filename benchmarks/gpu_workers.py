"""Worker processes of `benchmarks.gpu`, with JAX or PyTorch, which prepare and run cases on request.

A worker reads one JSON object per line (`{"prepare": case}`, `{"run": "throughput" | "latency"}`) and answers with one.
Inputs are on the device. `throughput`: calls follow each other without waiting, with one wait at the end. `latency`:
each call's logits are copied to the host before the next call.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .inference import CLASSES, Case, torch_model


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled net with a batch: `start` begins a call, `wait` waits for all calls, `fetch` returns one's logits."""

    start: Callable[[], Any]
    wait: Callable[[Any], None]
    fetch: Callable[[], np.ndarray]


def prepare_jax(case: Case) -> Prepared:
    """Prepare `rv.make_predictor`, or a ResNet under `jit`."""
    import jax
    import jax.numpy as jnp

    import repvgg_jax as rv

    from .resnet import ResNet

    exact = case.dtype == "float32" and not case.tf32
    with jax.default_matmul_precision("highest" if exact else "default"):
        images = jax.device_put(case.images())
        if case.model.startswith("ResNet"):
            model = ResNet(case.model, CLASSES, jnp.dtype(case.dtype))
            variables = jax.jit(model.init)(jax.random.key(0), images[:1])
            compiled = jax.jit(model.apply).lower(variables, images).compile()
            start: Callable[[], Any] = functools.partial(compiled, variables, images)
        else:
            net, variables = rv.load_weights(case.file(".safetensors"))
            predict = rv.make_predictor(net, variables, case.batch_size, case.image_size, dtype=jnp.dtype(case.dtype))
            start = functools.partial(predict.start, images)
    return Prepared(start, lambda result: result.block_until_ready(), lambda: np.asarray(start()))


def prepare_torch(case: Case, mode: str | None) -> Prepared:
    """Prepare the tests' PyTorch net in channels_last, with `torch.compile` in `mode`; eager if None."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    dtype = getattr(torch, case.dtype)
    torch.compiler.reset()
    model = torch_model(case).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    if mode is not None:
        model = torch.compile(model, mode=mode, dynamic=False)
    images = torch.from_numpy(case.images()).permute(0, 3, 1, 2).to(device=device, dtype=dtype)

    def start() -> Any:
        with torch.inference_mode():
            return model(images)

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    return Prepared(start, wait, lambda: start().float().cpu().numpy())


def seconds_per_call(prepared: Prepared, kind: str, least: float) -> float:
    """Measure calls for about `least` seconds, or one call if it takes longer; return the seconds per call."""

    def calls(count: int) -> float:
        begin = time.perf_counter()
        result = None
        for _ in range(count):
            result = prepared.fetch() if kind == "latency" else prepared.start()
        if kind != "latency":
            prepared.wait(result)
        return time.perf_counter() - begin

    once = calls(1)
    count = max(1, min(10_000, round(least / max(once, 1e-6))))
    return calls(count) / count


def work(name: str, least: float, mode: str | None) -> None:
    """Serve requests for one framework until stdin ends; only answers go to stdout, whatever libraries print."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    prepared: Prepared | None = None
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            case, prepared, begin = Case(**request["prepare"]), None, time.perf_counter()
            prepared = prepare_jax(case) if name == "ours" else prepare_torch(case, mode)
            prepared.fetch()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - begin}
            for kind in ("throughput", "latency"):  # CUDA graphs are recorded in the first calls
                seconds_per_call(prepared, kind, least / 3)
        else:
            assert prepared is not None
            answer = {"seconds": seconds_per_call(prepared, request["run"], least)}
        print(json.dumps(answer), file=answers, flush=True)


def device_facts() -> dict[str, Any]:
    """Return name, versions, and two measured limits: copy bandwidth (read plus written) and bfloat16 products."""
    import flax
    import jax
    import jax.numpy as jnp
    import torch

    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    size = 8192 if on_gpu else 256
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    numbers = jnp.ones((1 << 30 if on_gpu else 1 << 16,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready([function() for _ in range(3)])
            times.append((time.perf_counter() - begin) / 3)
        return min(times)

    return {
        "device": device.device_kind,
        "versions": f"jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}",
        "product_tflops": 2 * size**3 / best(lambda: product(a)) / 1e12,
        "copy_gb_per_second": 2 * numbers.nbytes / best(lambda: copy(numbers)) / 1e9,
    }


def check_all(names: Sequence[str], image_size: int) -> dict[str, Any]:
    """Measure differences that should only be rounding, per variant and of one train step.

    Per variant, relative to the norm of the logits: deploy form and training form in float32 at "highest" precision,
    deploy form in bfloat16 and training form in float32, and the training forms of PyTorch, with a file in the authors'
    names, and of this library. `file`: whether the native file gives the same logits to the bit.
    """
    from concurrent.futures import ThreadPoolExecutor

    from repvgg_jax.machine import cores

    with ThreadPoolExecutor(min(4, cores())) as pool:
        rows = dict(zip(names, pool.map(lambda name: _check_variant(name, image_size), names), strict=True))
    return {"variants": rows, "train_step": _check_train_step(image_size)}


def _relative(expected: Any, actual: Any) -> float:
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    return float(np.linalg.norm(expected - actual) / np.linalg.norm(expected))


def _check_variant(name: str, image_size: int) -> dict[str, Any]:
    import tempfile

    import jax
    import jax.numpy as jnp
    import torch

    import repvgg_jax as rv
    from tests.helpers import torch_oracle
    from tests.helpers.random_weights import random_variables

    model = rv.create_model(name, 100)
    variables = random_variables(model)
    deploy, fused = rv.to_deploy(model, variables)
    images = np.random.default_rng(1).standard_normal((4, image_size, image_size, 3), np.float32)

    def logits(net: rv.RepVGG, weights: Any) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(net.apply)(weights, images), np.float32)

    expected, from_deploy = logits(model, variables), logits(deploy, fused)
    half = rv.make_predictor(deploy, fused, 4, image_size, dtype=jnp.bfloat16)(images)
    with tempfile.TemporaryDirectory() as folder:
        native, foreign = Path(folder) / "net.safetensors", Path(folder) / "net.pth"
        rv.save_weights(native, deploy, fused)
        from_file = logits(*rv.load_weights(native))
        rv.save_weights(foreign, model, variables)
        oracle = torch_oracle.create(name, 100)
        oracle.load_state_dict(torch.load(foreign, weights_only=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        theirs = oracle.eval().to(device)(torch.from_numpy(images).permute(0, 3, 1, 2).to(device)).cpu().numpy()
    return {
        "deploy": _relative(expected, from_deploy),
        "bfloat16": _relative(expected, half),
        "torch": _relative(theirs, expected),
        "file": bool(np.array_equal(from_file, from_deploy)),
    }


def _check_train_step(image_size: int) -> dict[str, float]:
    """Compare one float32 step of A0 on the accelerator and on the host's CPU, with the same state and batch."""
    import jax
    import optax

    import repvgg_jax as rv
    from repvgg_jax.preprocess import Preprocessing
    from tests.helpers.random_weights import random_variables
    from train.state import create_state
    from train.step import make_train_step

    model = rv.create_model("RepVGG-A0", 100)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(model, optimizer, optax.constant_schedule(0.1), Preprocessing(image_size))
    rng = np.random.default_rng(2)
    batch = {
        "image": rng.integers(0, 256, (16, image_size, image_size, 3), np.uint8),
        "label": rng.integers(0, 100, 16).astype(np.int32),
    }
    state = create_state(model, optimizer, 0, (image_size, image_size, 3), variables=random_variables(model))
    results = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            results.append(jax.device_get(jax.jit(step)(*jax.device_put((state, batch), device))))
    (here, here_metrics), (there, there_metrics) = results
    moved = [
        np.concatenate([np.ravel(new) - np.ravel(old) for new, old in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((here.params, jax.device_get(state.params)), (there.params, jax.device_get(state.params)))
    ]
    return {
        "loss": abs(float(here_metrics["loss"] / there_metrics["loss"]) - 1),
        "update": _relative(moved[1], moved[0]),
        "statistics": _relative(
            *(np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.batch_stats)]) for s in (there, here))
        ),
    }


def profile_step(model_name: str, batch_size: int, image_size: int) -> dict[str, Any]:
    """Return the `seconds` of one bfloat16 train step, and its `kernels`.

    They are pairs of a kernel's name, without numbers, and its share of the device's time, largest first.
    """
    import re
    import tempfile
    from collections import Counter

    import jax

    from .train_step import make_ours

    advance, held = make_ours(model_name, batch_size, image_size)

    def steps(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            advance()
        jax.block_until_ready(held["metrics"])
        return (time.perf_counter() - begin) / count

    seconds = min(steps(count) for count in (3, 20, 20))
    times: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(1)
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if "/device:GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            times[re.sub(r"[._]?\d+", "", event.name)] += event.duration_ns
    total = sum(times.values())
    return {"seconds": seconds, "kernels": [(name, time / total) for name, time in times.most_common(12)]}
