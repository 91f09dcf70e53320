"""Time and memory of loading the authors' RepVGG-B3 file, compared with `torch.load` and `load_state_dict`.

Each measurement runs in a separate process, and does not include imports, JAX's start and PyTorch's model construction.
Memory is the peak resident set minus that after importing torch (for this library too, although its loading does not
need torch). Run `python -m benchmarks.load_weights`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.weights.key_maps import AUTHORS
from repvgg_jax.weights.state_dict import state_dict

from .arguments import Parser
from .contest import resident_bytes

RUNS = 7


def write_file(path: Path, name: str) -> None:
    """Write a training-form file in the authors' format with random weights."""
    import torch

    variant, rng = rv.create_model(name).variant, np.random.default_rng(0)
    shapes = expected_shapes(variant, False, 1000, 3)
    arrays = {leaf: rng.random(shape, np.float32) + 0.1 for leaf, shape in shapes.items()}
    state = state_dict(AUTHORS, arrays, variant, False, 1000, 3)
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, path)


def measure_ours(path: str) -> dict[str, float]:
    """Measure the seconds and peak bytes of `rv.load_weights`."""
    import jax
    import torch  # noqa: F401 (part of the other measurement's baseline)

    jax.block_until_ready(jax.device_put(np.zeros(1)))
    baseline, start = resident_bytes("VmRSS"), time.perf_counter()
    jax.block_until_ready(rv.load_weights(path)[1])
    return {"seconds": time.perf_counter() - start, "bytes": resident_bytes("VmHWM") - baseline}


def measure_torch(path: str) -> dict[str, float]:
    """Measure the seconds and peak bytes of `torch.load` and `load_state_dict` into modules of the file's shapes."""
    import torch

    # Parameters with the file's names and shapes, allocated and touched like a model's.
    described = torch.load(path, weights_only=True, mmap=True, map_location="meta")
    root = torch.nn.Module()
    for key, tensor in described.items():
        *parents, leaf = key.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, torch.zeros_like(tensor, device="cpu").fill_(1))
    baseline, start = resident_bytes("VmRSS"), time.perf_counter()
    root.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return {"seconds": time.perf_counter() - start, "bytes": resident_bytes("VmHWM") - baseline}


def measure(which: str, path: Path) -> dict[str, float]:
    """Take one measurement in a fresh process, with the file in the page cache."""
    command = [sys.executable, "-m", "benchmarks.load_weights", "--measure", which, "--file", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def least(runs: list[dict[str, float]]) -> tuple[float, float]:
    """Return the shortest time, which is the least disturbed, and the largest memory."""
    return min(run["seconds"] for run in runs), max(run["bytes"] for run in runs)


def main() -> None:
    """Measure, and print both measurements and their ratios."""
    parser = Parser("python -m benchmarks.load_weights", description=__doc__)
    parser.add_argument("--model", default="RepVGG-B3", help="name of a variant (default: RepVGG-B3)")
    parser.add_argument("--measure", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps({"ours": measure_ours, "torch": measure_torch}[arguments.measure](str(arguments.file))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        write_file(path, arguments.model)
        size = path.stat().st_size
        pairs = [(measure("torch", path), measure("ours", path)) for _ in range(RUNS)]
    (their_time, their_memory), (our_time, our_memory) = (least(list(runs)) for runs in zip(*pairs, strict=True))
    print(f"{arguments.model}, training form, {size / 1e6:.0f} MB, best of {RUNS} interleaved runs")
    print(f"torch.load + load_state_dict  {their_time:.2f} s  peak +{their_memory / size:.2f} x file")
    print(f"repvgg_jax.load_weights       {our_time:.2f} s  peak +{our_memory / size:.2f} x file")
    print(f"time ratio {our_time / their_time:.2f} (at most 1.3), memory {our_memory / size:.2f} (at most 1.5)")


if __name__ == "__main__":
    run_command(main)
