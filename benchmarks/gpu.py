"""Benchmark on a GPU: correctness, speed compared with `torch.compile`, and the time of a train step's kernels.

`python -m benchmarks.gpu` takes at most `--minutes` (8) on one H100 or H200. It needs only what a CUDA image for JAX
and PyTorch has: jax, flax, optax, torch, safetensors, pillow and OpenCV, but not tensorflow, tyro or simplejpeg.

1. `correctness`: every variant, both forms, native and PyTorch files, float32 and bfloat16, and one train step
   compared with the host's CPU.
2. `headlines`: the paper's pairs, A2 with ResNet-50 and B1g4 with ResNet-101.
3. `profile`: the kernels of one train step.
4. `inference`: bfloat16, TF32 and float32 at several batch sizes, first this library alone, then compared with
   `torch.compile(mode="max-autotune")`.
5. `training`: the bfloat16 train step compared with `torch.compile`.
6. `cifar10`, only with `--cifar10 FOLDER`: the preset of that name at full length. It needs tyro and simplejpeg.

Fast measurements come first: this library compiles in seconds, `torch.compile` in minutes. Measurements that do not fit
into the minutes are stopped or skipped, and named; `--sections` and `--minutes` spread them over several runs. One
dated row is added to `RESULTS.md`. `--dry` runs everything on a CPU with small images, without `torch.compile`.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repvgg_jax.cli import run_command

from . import gpu_sections
from .arguments import Parser, positive_float, positive_int
from .gpu_budget import DRY, FULL, PRECISIONS, Clock, environment

SECTIONS = ("correctness", "headlines", "profile", "inference", "training", "cifar10")


def facts() -> dict[str, Any]:
    """Return `gpu_workers.device_facts`, measured in a separate process, which frees the memory."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "facts"]
    run = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def append_row(path: Path, device: dict[str, Any], phrases: Sequence[str], clock: Clock) -> None:
    """Add a dated row at the end of the table."""
    left_out = [f"not measured for lack of time: {', '.join(clock.left_out)}"] if clock.left_out else []
    ceilings = f"{device['product_tflops']:.0f} TFLOP/s bfloat16 product, {device['copy_gb_per_second']:.0f} GB/s copy"
    text = "; ".join([*phrases, *left_out]).replace("|", "/")
    date = datetime.datetime.now(datetime.UTC).date()
    row = f"| {date} | `gpu.py` | one {device['device']} ({ceilings}) | {device['versions']} | {text} |"
    lines = path.read_text(encoding="utf-8").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("|"))
    path.write_text("\n".join([*lines[: last + 1], row, *lines[last + 1 :]]) + "\n", encoding="utf-8")


def serve(arguments: argparse.Namespace) -> None:
    """Run one of the processes that this script starts."""
    from . import gpu_workers

    models = json.loads(arguments.models or "[]")
    if arguments.worker == "facts":
        print(json.dumps(gpu_workers.device_facts()))
    elif arguments.worker == "correctness":
        import repvgg_jax as rv

        print(json.dumps(gpu_workers.check_all(models or rv.list_models(), arguments.image_size)))
    elif arguments.worker == "profile":
        print(json.dumps(gpu_workers.profile_step(models[0], arguments.batch_size, arguments.image_size)))
    else:
        gpu_workers.work(arguments.worker, arguments.seconds, arguments.torch_mode or None)


def main() -> None:
    """Measure, print the results and record them."""
    parser = Parser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run (default: all)"
    )
    parser.add_argument("--minutes", type=positive_float, help="time limit for all sections together")
    parser.add_argument("--training-models", nargs="+", help="models whose train step is measured")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), help="precisions of `inference`")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, help="batch sizes of `inference`")
    parser.add_argument("--cifar10", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).with_name("RESULTS.md"), help="table to add a row to"
    )
    parser.add_argument(
        "--dry", action="store_true", help="run on a CPU with small images, without recording the results"
    )
    for internal in ("--worker", "--models", "--torch-mode"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--image-size", type=positive_int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=positive_int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        serve(arguments)
        return

    settings = DRY if arguments.dry else FULL
    changes = {
        "minutes": arguments.minutes,
        "precisions": arguments.precisions,
        "batch_sizes": arguments.batch_sizes,
        "photographs": arguments.cifar10,
        "training": [case for case in settings.training if case[0] in (arguments.training_models or ())],
    }
    settings = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value})
    clock, phrases = Clock(settings.minutes), []
    device = facts()
    print(", ".join(f"{name}: {value if isinstance(value, str) else round(value)}" for name, value in device.items()))
    for section in SECTIONS:
        if section in arguments.sections:
            phrases += getattr(gpu_sections, section)(settings, clock)
    if not arguments.dry:
        append_row(arguments.results, device, phrases, clock)
    print(f"{60 * settings.minutes - clock.seconds_left():.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
