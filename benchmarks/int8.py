"""Compare a net in float32 and INT8 in the predictor, ONNX Runtime and OpenVINO (QDQ): images/s, ratios, file sizes.

Run `python -m benchmarks.int8 [--model RepVGG-A0] [--batch-size 1]`. Each file in each runtime has a separate process.
They take turns for several rounds, and each turn is one measurement of at least `SECONDS`. The median counts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_int
from .contest import Contestant, Numbers, alternate, peak_resident_bytes, serve, versions

SECONDS = 1.0
FILES, RUNTIMES = ("float32", "int8"), ("repvgg_jax", "onnxruntime", "openvino")


def write_files(folder: Path, name: str, image_size: int) -> None:
    """Write a net with random weights (speed does not depend on them) as `float32` and `int8`, in both formats."""
    import repvgg_jax as rv
    from tests.helpers.random_weights import random_variables

    model = rv.create_model(name, deploy=True)
    variables = random_variables(model)
    preprocessing = rv.Preprocessing(image_size=image_size)
    images = np.random.default_rng(0).integers(0, 256, (8, image_size, image_size, 3), np.uint8)
    rv.export_onnx(folder / "float32.onnx", model, variables, preprocessing=preprocessing)
    net = rv.quantize(model, variables, images, "per-channel", preprocessing=preprocessing)
    rv.export_quantized_onnx(folder / "int8.onnx", net)
    rv.save_weights(folder / "float32.safetensors", model, variables)
    rv.save_quantized(folder / "int8.safetensors", net)


def make_ours(path: Path, images: np.ndarray) -> Callable[[], object]:
    """Return the predictor with the same images in its layout."""
    import repvgg_jax as rv

    count, _, height, width = images.shape
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if path.stem == "int8":
        predict = rv.make_predictor(rv.load_quantized(path), None, count, (height, width))
    else:
        predict = rv.make_predictor(*rv.load_weights(path), count, (height, width))
    return lambda: predict(channels_last)


def make_onnxruntime(path: Path, images: np.ndarray) -> Callable[[], object]:
    """Return the net in ONNX Runtime with its defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images})


def make_openvino(path: Path, images: np.ndarray) -> Callable[[], object]:
    """Return the net in OpenVINO, tuned for the latency of one request at a time, with float32 where not INT8."""
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    network.reshape(list(images.shape))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(network, "CPU", options).create_infer_request()
    return lambda: request.infer({0: images})


def work(contestant: str, folder: Path, batch_size: int, image_size: int) -> None:
    """Run a worker: load, warm up, then measure on request."""
    file, runtime = contestant.split("-")
    images = np.random.default_rng(0).standard_normal((batch_size, 3, image_size, image_size), np.float32)
    make = {"repvgg_jax": make_ours, "onnxruntime": make_onnxruntime, "openvino": make_openvino}[runtime]
    predict = make(folder / f"{file}{'.safetensors' if runtime == 'repvgg_jax' else '.onnx'}", images)
    for _ in range(3):
        predict()

    def run() -> Numbers:
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            predict()
            count += 1
        return {"images_per_second": count * batch_size / elapsed}

    serve(run, lambda: {"peak_bytes": peak_resident_bytes()})


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = Parser("python -m benchmarks.int8", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="RepVGG-A0", help="name of a variant (default: RepVGG-A0)")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="images per call (default: 1)")
    parser.add_argument(
        "--image-size", type=positive_int, default=224, help="height and width in pixels (default: 224)"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="measurements of each contestant (default: 7)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.folder, arguments.batch_size, arguments.image_size)
        return

    import onnxruntime
    import openvino

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, arguments.model, arguments.image_size)
        sizes = {file: (folder / f"{file}.onnx").stat().st_size for file in FILES}
        options = ["--folder", name, "--batch-size", arguments.batch_size, "--image-size", arguments.image_size]
        names = [f"{file}-{runtime}" for runtime in RUNTIMES for file in FILES]
        contestants = [Contestant(name, "benchmarks.int8", [*map(str, options)]) for name in names]
        alternate(contestants, arguments.rounds)
    speed = {c.name: statistics.median(run["images_per_second"] for run in c.runs) for c in contestants}
    what = f"{arguments.model}, {arguments.image_size} pixels, batch {arguments.batch_size}"
    print(f"{what}; {versions(onnxruntime, openvino)}")
    print(f"file: {sizes['int8']:,} of {sizes['float32']:,} bytes, {sizes['int8'] / sizes['float32']:.3f}")
    print("| runtime | float32 images/s | int8 images/s | ratio |\n|---|---|---|---|")
    for runtime in RUNTIMES:
        float32, int8 = (speed[f"{file}-{runtime}"] for file in FILES)
        print(f"| {runtime} | {float32:.1f} | {int8:.1f} | {int8 / float32:.2f} |")


if __name__ == "__main__":
    run_command(main)
