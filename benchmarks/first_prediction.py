"""Time to the first prediction of a fresh process: import, load RepVGG-A0's weights, compile, predict one image.

Run `python -m benchmarks.first_prediction`. It is compared with eager PyTorch: import, build, `load_state_dict`,
predict. They take turns, and the whole process counts, from start to end. This library is measured with warm caches
(JAX's compilation cache and the compiled convolutions), and once without any (cold).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from repvgg_jax.cli import run_command

from .arguments import Parser, positive_int
from .inference import Case, make_ours, make_torch, write_files


def predict_once(which: str, case: Case) -> None:
    """Load the weights and predict one image, in a fresh process."""
    make = {"ours": lambda: make_ours(case, tune=False), "torch": lambda: make_torch(case, compiled=False)}[which]
    assert make()(case.images()).shape == (1, 1000)


def seconds(which: str, folder: str, model: str, caches: Path) -> float:
    """Return the duration of one process, with JAX's compilation cache and this library's under `caches`."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(caches),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "benchmarks.first_prediction", "--worker", which, "--folder", folder]
    start = time.perf_counter()
    subprocess.run([*command, "--model", model], check=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print the results."""
    parser = Parser("python -m benchmarks.first_prediction", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="RepVGG-A0", help="name of a variant (default: RepVGG-A0)")
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="number of processes to measure per library (default: 7)"
    )
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        predict_once(arguments.worker, Case(arguments.folder, arguments.model, 1, 224))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Case(folder, arguments.model, 1, 224), onnx=False)
        caches = Path(folder) / "caches"
        cold = seconds("ours", folder, arguments.model, caches)
        runs = [
            [seconds(which, folder, arguments.model, caches) for which in ("torch", "ours")]
            for _ in range(arguments.rounds)
        ]
    theirs, ours = (statistics.median(times) for times in zip(*runs, strict=True))
    print(f"{arguments.model}, one image, whole process, median of {arguments.rounds} interleaved runs")
    print(f"PyTorch, eager          {theirs:.2f} s")
    print(f"ours, caches warm       {ours:.2f} s, {ours / theirs:.2f} x (at most 1.5)")
    print(f"ours, cold              {cold:.2f} s, {cold / theirs:.2f} x")


if __name__ == "__main__":
    run_command(main)
