"""Benchmark of deploy inference with other runtimes: images/s, ratios, agreement, peak memory.

On a CPU, `python -m benchmarks.inference [--models …] [--batch-sizes …]` compares the predictor with plain `jit`,
PyTorch (eager, and with `torch.compile`), ONNX Runtime and OpenVINO; `--dtype bfloat16` omits plain `jit` and ONNX
Runtime. `--device gpu` compares it with `torch.compile(mode="max-autotune")` in float32 (with and without TF32) and
bfloat16, and then the paper's pairs with JAX: A2 with ResNet-50 and B1g4 with ResNet-101 (83 and 101 % faster in the
paper, with PyTorch on a 1080Ti).

All run the same random weights on the same images, each in a separate process. They take turns for several rounds, and
each turn is one measurement of at least `SECONDS`. The median counts. Outputs are compared with float64.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_int
from .contest import Contestant, Numbers, alternate, peak_resident_bytes, serve

CPU_NAMES = ("ours", "ours tuned", "plain jit", "torch", "torch.compile", "onnxruntime", "openvino")
# ONNX Runtime has no bfloat16 convolution on CPUs, and tuned plans are measured in float32.
BF16_NAMES = ("ours", "torch", "torch.compile", "openvino")
OURS = ("ours", "ours tuned")
GPU_NAMES = ("ours", "torch.compile")
HEADLINES = (("RepVGG-A2", "ResNet-50", "+83%"), ("RepVGG-B1g4", "ResNet-101", "+101%"))
SECONDS = 0.5
CLASSES = 1000

Predict = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """The net, weights and images that a contestant runs; passed to the worker as JSON."""

    folder: str
    model: str
    batch_size: int
    image_size: int
    dtype: str = "float32"
    tf32: bool = False
    pause: float = 0

    def images(self) -> np.ndarray:
        """Return random normalised pixels, float32 `[N, H, W, 3]`."""
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def file(self, suffix: str) -> Path:
        """Return the path of the weights in one of the formats, or of a contestant's logits."""
        return Path(self.folder) / f"{self.model}{suffix}"


def write_files(case: Case, *, onnx: bool) -> None:
    """Write the deploy-form weights for all contestants, fused from a training form with random BatchNorm."""
    import jax

    import repvgg_jax as rv
    from tests.helpers.random_weights import random_variables

    model = rv.create_model(case.model, CLASSES)
    deploy, variables = rv.to_deploy(model, jax.tree.map(np.asarray, random_variables(model)))
    rv.save_weights(case.file(".safetensors"), deploy, variables)
    rv.save_weights(case.file(".pth"), deploy, variables)
    if onnx:
        rv.export_onnx(case.file(".onnx"), deploy, variables)


def reference_logits(case: Case) -> np.ndarray:
    """Return the logits `[N, classes]` that PyTorch computes in float64."""
    import torch

    model = torch_model(case).double()
    with torch.inference_mode():
        return model(torch.from_numpy(case.images()).double().permute(0, 3, 1, 2)).numpy()


def torch_model(case: Case) -> Any:
    """Return the independent PyTorch implementation that the tests use, in deploy form."""
    import torch

    from tests.helpers import torch_oracle

    model = torch_oracle.create(case.model, CLASSES, deploy=True).eval()
    model.load_state_dict(torch.load(case.file(".pth"), weights_only=True))
    return model


def make_ours(case: Case, *, tune: bool) -> Predict:
    """Return the predictor of `rv.make_predictor`."""
    import jax.numpy as jnp

    import repvgg_jax as rv

    model, variables = rv.load_weights(case.file(".safetensors"))
    return rv.make_predictor(model, variables, case.batch_size, case.image_size, dtype=jnp.dtype(case.dtype), tune=tune)


def make_plain_jit(case: Case) -> Predict:
    """Return the net under `jit`, with XLA's convolutions only and JAX's defaults."""
    import jax

    import repvgg_jax as rv

    model, variables = rv.load_weights(case.file(".safetensors"))
    apply = jax.jit(model.clone(dtype=case.dtype).apply)
    return lambda images: np.asarray(apply(variables, images))


def make_resnet(case: Case) -> Predict:
    """Return a ResNet with random weights and folded BN, under `jit`."""
    import jax
    import jax.numpy as jnp

    from .resnet import ResNet

    model = ResNet(case.model, CLASSES, jnp.dtype(case.dtype))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, case.image_size, case.image_size, 3)))
    apply = jax.jit(model.apply)
    return lambda images: np.asarray(apply(variables, images))


def make_torch(case: Case, *, compiled: bool) -> Predict:
    """Return the PyTorch net in channels_last, eager or with `torch.compile`."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    dtype = getattr(torch, case.dtype)
    model = torch_model(case).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        model = torch.compile(model, mode="max-autotune" if on_gpu else "default")

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).permute(0, 3, 1, 2)  # already NHWC in memory, so this is channels_last
            return model(x.to(device=device, dtype=dtype)).float().cpu().numpy()

    return predict


def make_onnxruntime(case: Case) -> Predict:
    """Return the net in ONNX Runtime with its defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(case.file(".onnx"), providers=["CPUExecutionProvider"])
    images = np.ascontiguousarray(case.images().transpose(0, 3, 1, 2))  # the conversion to its layout is not timed
    return lambda _: session.run(None, {"images": images})[0]


def make_openvino(case: Case) -> Predict:
    """Return the net in OpenVINO in the case's dtype, tuned for the latency of one request at a time."""
    import openvino

    core = openvino.Core()
    network = core.read_model(case.file(".onnx"))
    network.reshape([case.batch_size, 3, case.image_size, case.image_size])
    precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(network, "CPU", options).create_infer_request()
    images = np.ascontiguousarray(case.images().transpose(0, 3, 1, 2))

    def predict(_: np.ndarray) -> np.ndarray:
        return np.array(request.infer({0: images})[0])

    return predict


def contestant_predict(name: str, case: Case) -> Predict:
    """Return the function to time for the contestant `name`."""
    makers: dict[str, Callable[[Case], Predict]] = {
        "ours": lambda case: make_ours(case, tune=False),
        "ours tuned": lambda case: make_ours(case, tune=True),
        "plain jit": make_plain_jit,
        "resnet": make_resnet,
        "torch": lambda case: make_torch(case, compiled=False),
        "torch.compile": lambda case: make_torch(case, compiled=True),
        "onnxruntime": make_onnxruntime,
        "openvino": make_openvino,
    }
    return makers[name](case)


def work(name: str, case: Case) -> None:
    """Run a worker: compile, write the logits for comparison, then measure on request."""
    if case.dtype == "float32" and name in OURS and not case.tf32:
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU; no effect on a CPU
    predict, images = contestant_predict(name, case), case.images()
    baseline = peak_resident_bytes()  # libraries and weights; the rest is used by the runtime
    np.save(case.file(f"-{name}.npy"), predict(images))

    def run() -> Numbers:
        calls, total = 0, 0.0
        while calls == 0 or total < SECONDS:
            if case.pause:
                time.sleep(case.pause)
            start = time.perf_counter()
            predict(images)
            total += time.perf_counter() - start
            calls += 1
        return {"seconds": total / calls}

    run()
    serve(run, lambda: {"bytes": peak_resident_bytes(), "before_first_call": baseline})


def roofline() -> float:
    """Return the multiply-adds per second of a large float32 matrix product, by PyTorch or XLA, whichever is faster."""
    import jax
    import torch

    size = 2048
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    tensor, array, product = torch.from_numpy(a), jax.device_put(a), jax.jit(lambda x: x @ x)

    def rate(multiply: Callable[[], Any]) -> float:
        multiply()
        times = []
        for _ in range(15):
            start = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - start)
        return size**3 / min(times)

    return max(rate(lambda: tensor @ tensor), rate(lambda: product(array).block_until_ready()))


def contest(case: Case, names: Sequence[str], rounds: int) -> dict[str, Contestant]:
    """Measure all contestants on one case, in turn."""
    line = json.dumps(dataclasses.asdict(case))
    contestants = [Contestant(name, "benchmarks.inference", ["--case", line]) for name in names]
    alternate(contestants, rounds)
    return {contestant.name: contestant for contestant in contestants}


def seconds(contestant: Contestant) -> float:
    """Return the median seconds per call over the rounds."""
    return statistics.median(run["seconds"] for run in contestant.runs)


def multiplications(model: str, image_size: int) -> int:
    """Return the multiplications of the deploy form for one image, with direct convolution."""
    import repvgg_jax as rv
    from repvgg_jax.inference.plan import stage_layers

    variant = rv.create_model(model).variant
    layers = [layer for stage in stage_layers(variant, (image_size, image_size)) for layer in stage]
    return sum(layer.shape.multiplications() for layer in layers)


def report(case: Case, contestants: dict[str, Contestant], peak: float | None, reference: np.ndarray | None) -> None:
    """Print the results of one case as a block of the table."""
    peers = {name: seconds(c) for name, c in contestants.items() if name not in OURS}
    best = min(peers.values()) if peers else None
    title = f"{case.model}, batch {case.batch_size}, {case.image_size}x{case.image_size}, {case.dtype}"
    title += " (TF32)" if case.tf32 else ""
    title += f", {case.pause} s between calls" if case.pause else ""
    print(f"\n{title}\n{'':14} {'ms':>9} {'images/s':>9} {'best peer':>10} {'roofline':>9} {'peak MB':>8} {'error':>8}")
    for name, contestant in contestants.items():
        call = seconds(contestant)
        ratio = f"{best / call:.2f} x" if best else ""
        bound = ""
        if peak is not None:
            direct = multiplications(case.model, case.image_size) * case.batch_size
            bound = f"{direct / call / peak:.2f}"
        error = ""
        if reference is not None:
            logits = np.load(case.file(f"-{name}.npy"))
            error = f"{np.linalg.norm(logits - reference) / np.linalg.norm(reference):.0e}"
        memory = contestant.summary["bytes"] / 1e6
        print(
            f"{name:14} {1e3 * call:9.2f} {case.batch_size / call:9.1f} {ratio:>10} {bound:>9} "
            f"{memory:8.0f} {error:>8}",
            flush=True,
        )


def run_cpu(arguments: argparse.Namespace) -> None:
    """Measure and print the table for a CPU."""
    peak = roofline()
    print(f"matrix product: {peak / 1e9:.0f} G multiply-adds/s; `roofline`: direct multiplications/s divided by that")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Case(folder, model, 1, arguments.image_size), onnx=True)
            for batch_size in arguments.batch_sizes:
                case = Case(folder, model, batch_size, arguments.image_size, arguments.dtype, pause=arguments.pause)
                report(case, contest(case, arguments.contestants, arguments.rounds), peak, reference_logits(case))


def run_gpu(arguments: argparse.Namespace) -> None:
    """Measure and print the tables for a GPU."""
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Case(folder, model, 1, arguments.image_size), onnx=False)
            for batch_size in arguments.batch_sizes:
                for dtype, tf32 in (("float32", False), ("float32", True), ("bfloat16", False)):
                    case = Case(folder, model, batch_size, arguments.image_size, dtype, tf32)
                    report(case, contest(case, GPU_NAMES, arguments.rounds), None, None)
    for dtype in ("float32", "bfloat16"):
        report_headlines(arguments.headline_batch, arguments.image_size, dtype, arguments.rounds)


def report_headlines(batch_size: int, image_size: int, dtype: str, rounds: int) -> None:
    """Measure and print how much faster RepVGG is than the ResNet of the same accuracy."""
    print(f"\nbatch {batch_size}, {image_size}x{image_size}, {dtype}")
    for name, resnet, published in HEADLINES:
        with tempfile.TemporaryDirectory() as folder:
            cases = {"ours": Case(folder, name, batch_size, image_size, dtype)}
            cases["resnet"] = dataclasses.replace(cases["ours"], model=resnet)
            write_files(cases["ours"], onnx=False)
            runners = [
                Contestant(who, "benchmarks.inference", ["--case", json.dumps(dataclasses.asdict(case))])
                for who, case in cases.items()
            ]
            alternate(runners, rounds)
        ours, theirs = (batch_size / seconds(runner) for runner in runners)
        print(
            f"{name} {ours:.1f} images/s, {resnet} {theirs:.1f}: {ours / theirs - 1:+.0%} (paper: {published})",
            flush=True,
        )


def main() -> None:
    """Measure, and print the results."""
    parser = Parser("python -m benchmarks.inference", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["RepVGG-A0", "RepVGG-A2", "RepVGG-B1"], help="names of variants"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive_int, help="default: 1 16 64 on a CPU, 1 128 1024 on a GPU"
    )
    parser.add_argument(
        "--image-size", type=positive_int, default=224, help="height and width in pixels (default: 224)"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="measurements of each contestant (default: 7)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--headline-batch", type=positive_int, default=128, help="batch of the paper's pairs (default: 128)"
    )
    parser.add_argument("--contestants", nargs="+", choices=CPU_NAMES, help="on a CPU: what to compare (default: all)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="on a CPU (default: float32)"
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=0,
        help="on a CPU: seconds between calls, as in a service with little to do (default: 0)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, Case(**json.loads(arguments.case)))
        return
    if arguments.batch_sizes is None:
        arguments.batch_sizes = [1, 16, 64] if arguments.device == "cpu" else [1, 128, 1024]
    if arguments.contestants is None:
        arguments.contestants = BF16_NAMES if arguments.dtype == "bfloat16" else CPU_NAMES
    print(f"Python {sys.version.split()[0]}, {arguments.rounds} rounds", flush=True)
    (run_cpu if arguments.device == "cpu" else run_gpu)(arguments)


if __name__ == "__main__":
    run_command(main)
