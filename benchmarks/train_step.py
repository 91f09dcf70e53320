"""Compare a training step with PyTorch's: images/s and peak memory.

Run `python -m benchmarks.train_step [--models …] [--batch-size N] [--image-size N]`. The PyTorch side is the
independent implementation that the tests use, in channels_last (see `--memory-format`), eager and, with `--compile`,
with `torch.compile`. On a GPU, both sides compute in bfloat16 (PyTorch by autocast). Both use the same recipe: SGD with
momentum and masked weight decay. Processes alternate, so changes in the machine's speed affect all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_int
from .contest import Contestant, Numbers, alternate, peak_resident_bytes, serve

CLASSES = 1000
WARM_UP, STEPS = 2, 3


def batch(size: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random pixels, uint8 `[N, H, W, 3]`, and labels, int32 `[N]`."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (images, size, size, 3), np.uint8), rng.integers(0, CLASSES, images).astype(np.int32)


def timed(step: Callable[[], None], wait: Callable[[], None]) -> Callable[[], Numbers]:
    """Warm up, and return a function that measures `STEPS` steps and returns the seconds per step."""

    def run() -> Numbers:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        return {"seconds": (time.perf_counter() - start) / STEPS}

    for _ in range(WARM_UP):
        run()
    return run


def make_ours(model_name: str, batch_size: int, size: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Return a function that takes one pmapped step on one device, and the dict in which it puts state and metrics."""
    import jax

    import repvgg_jax as rv
    from repvgg_jax.preprocess import Preprocessing
    from train.optimizer import learning_rate_schedule, make_optimizer
    from train.parallel import AXIS, parallel, put_batch, replicate
    from train.presets import PRESETS
    from train.state import create_state
    from train.step import make_train_step

    options = PRESETS["imagenet_120"].optimizer
    on_cpu = jax.devices()[0].platform == "cpu"
    model = rv.create_model(model_name, CLASSES, dtype=jax.numpy.float32 if on_cpu else jax.numpy.bfloat16)
    schedule = learning_rate_schedule(options, 5000)
    optimizer = make_optimizer(options, schedule)
    step = make_train_step(model, optimizer, schedule, Preprocessing(size), axis_name=AXIS)
    run = parallel(step, donate=True)
    images, labels = batch(size, batch_size)
    inputs = put_batch({"image": images[None], "label": labels[None]})
    held: dict[str, Any] = {"state": replicate(create_state(model, optimizer, 0, (size, size, 3)))}

    def advance() -> None:
        held["state"], held["metrics"] = run(held["state"], inputs)

    return advance, held


def serve_ours(arguments: argparse.Namespace) -> None:
    """Serve requests with this library's pmapped step on one device."""
    import jax

    import repvgg_jax as rv
    from train.utilization import peak_flops, training_flops

    size = arguments.image_size
    advance, held = make_ours(arguments.model, arguments.batch_size, size)
    measure = timed(advance, lambda: jax.block_until_ready(held["metrics"]))
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, "float32" if device.platform == "cpu" else "bfloat16")

    def summary() -> Numbers:
        stats = device.memory_stats() or {}
        flops = training_flops(rv.create_model(arguments.model).variant, size, CLASSES) * arguments.batch_size
        return {
            "bytes": stats.get("peak_bytes_in_use", peak_resident_bytes()),
            "flops": flops,
            "utilization_a_second": flops / peak if peak else 0.0,
        }

    serve(measure, summary)


def serve_torch(arguments: argparse.Namespace, compiled: bool) -> None:
    """Serve requests with the same step in PyTorch."""
    import torch
    import torch.nn.functional as F

    from tests.helpers import torch_oracle

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model: torch.nn.Module = torch_oracle.create(arguments.model, CLASSES).to(device).train()
    layout = getattr(torch, arguments.memory_format)
    model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch's own stub lacks it
    groups = torch_oracle.recipe_parameter_groups(model, 1e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    forward = torch.compile(model) if compiled else model
    images, labels = batch(arguments.image_size, arguments.batch_size)
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels).long().to(device)
    mean = torch.tensor((0.485, 0.456, 0.406), device=device).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), device=device).view(1, 3, 1, 1)

    def advance() -> None:
        inputs = (pixels.float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(forward(inputs.contiguous(memory_format=layout)), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def summary() -> Numbers:
        return {"bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()}

    serve(timed(advance, torch.cuda.synchronize if on_gpu else lambda: None), summary)


def main() -> None:
    """Measure, and print a table."""
    parser = Parser("python -m benchmarks.train_step", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["RepVGG-A0", "RepVGG-B1", "RepVGG-D2se"], help="names of variants"
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images per step (default: 32)")
    parser.add_argument(
        "--image-size", type=positive_int, default=224, help="height and width in pixels (default: 224)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="measurements of each contestant (default: 5)")
    parser.add_argument("--compile", action="store_true", help="also measure PyTorch with torch.compile")
    parser.add_argument(
        "--memory-format",
        choices=("channels_last", "contiguous_format"),
        default="channels_last",
        help="memory format of PyTorch; on AVX-512 CPUs, PyTorch 2.13 corrupts its heap training in channels_last",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "ours":
        serve_ours(arguments)
        return
    if arguments.worker is not None:
        serve_torch(arguments, compiled=arguments.worker == "torch.compile")
        return

    from repvgg_jax.net.variants import get_variant  # here, as JAX would count in the memory of PyTorch's process

    for model in arguments.models:
        get_variant(model)  # raises an error before the workers start
    names = ["ours", "torch"] + (["torch.compile"] if arguments.compile else [])
    print(f"{'model':16} {'':14} {'ms/step':>9} {'images/s':>9} {'peak GB':>8} {'speed of ours':>14}")
    for model in arguments.models:
        shared = ["--model", model, "--batch-size", str(arguments.batch_size)]
        shared += ["--image-size", str(arguments.image_size), "--memory-format", arguments.memory_format]
        contestants = [Contestant(name, "benchmarks.train_step", shared) for name in names]
        alternate(contestants, arguments.rounds)
        seconds = {c.name: statistics.median(run["seconds"] for run in c.runs) for c in contestants}
        for contestant in contestants:
            step = seconds[contestant.name]
            ratio = "" if contestant.name == "ours" else f"{step / seconds['ours']:.2f} x"
            memory = contestant.summary["bytes"] / 1e9
            print(
                f"{model:16} {contestant.name:14} {1e3 * step:9.1f} {arguments.batch_size / step:9.1f} {memory:8.2f} "
                f"{ratio:>14}"
            )
        utilization = contestants[0].summary["utilization_a_second"] / seconds["ours"]
        if utilization:
            print(f"{model:16} model FLOP utilisation {100 * utilization:.1f} %")


if __name__ == "__main__":
    run_command(main)
