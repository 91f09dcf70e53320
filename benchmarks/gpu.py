"""One script for a GPU: correctness, speed beside `torch.compile`, and what a train step spends its time on.

`python -m benchmarks.gpu` takes at most `--minutes` (8) on one H100 or H200. It needs what a CUDA image for JAX and
PyTorch holds: jax, flax, optax, torch, safetensors, pillow and OpenCV; no tensorflow, tyro or simplejpeg.

1. `correctness`: every variant, both forms, native and PyTorch files, float32 and bfloat16, one train step
   against the host's CPU.
2. `headlines`: the paper's pairs, A2 beside ResNet-50 and B1g4 beside ResNet-101.
3. `profile`: the kernels of one train step.
4. `inference`: bfloat16, TF32 and float32 at several batch sizes, ours alone and then beside
   `torch.compile(mode="max-autotune")`.
5. `training`: the bfloat16 train step beside `torch.compile`.

Cheap things come first: ours takes seconds to compile, `torch.compile` minutes. What does not fit into the minutes is
stopped or left out, and named; `--sections` and `--minutes` spread the rest over several runs. One dated row goes into
`RESULTS.md`. `--dry` walks through everything on a CPU with small images, without `torch.compile`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .contest import Contestant, ContestantDiedError, alternate
from .inference import HEADLINES, Case, write_files

SECTIONS = ("correctness", "headlines", "profile", "inference", "training")
PRECISIONS = {"bfloat16": ("bfloat16", False), "tf32": ("float32", True), "float32": ("float32", False)}
LIMITS = {"deploy": 1e-5, "bfloat16": 5e-2, "torch": 1e-5}
"""Largest relative differences of logits that are rounding; the last two of deep nets on random weights."""
STEP_LIMITS = {"loss": 1e-5, "update": 1e-2, "statistics": 1e-5}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and for how long."""

    minutes: float
    models: Sequence[str]
    training: Sequence[tuple[str, int]]
    batch_sizes: Sequence[int]
    precisions: Sequence[str]
    image_size: int
    check_size: int
    rounds: int
    seconds: float
    torch_mode: str | None


FULL = Settings(
    minutes=8,
    models=(),
    training=(("RepVGG-A0", 128), ("RepVGG-D2se", 64), ("RepVGG-B1", 128)),
    batch_sizes=(1, 128, 32, 1024),
    precisions=tuple(PRECISIONS),
    image_size=224,
    check_size=64,
    rounds=5,
    seconds=0.3,
    torch_mode="max-autotune",
)
DRY = Settings(
    minutes=8,
    models=("RepVGG-A0",),
    training=(("RepVGG-A0", 2),),
    batch_sizes=(1, 2),
    precisions=("float32",),
    image_size=32,
    check_size=32,
    rounds=1,
    seconds=0.0,
    torch_mode=None,
)


class Clock:
    """The minutes that are left, and what was left out for want of them."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def seconds_left(self) -> float:
        """Until the end; negative after it."""
        return self._end - time.monotonic()

    @contextmanager
    def stops(self, what: str, contestants: Sequence[Contestant]) -> Iterator[None]:
        """Kill the contestants when the minutes are over, and note `what` as left out."""
        timer = threading.Timer(max(self.seconds_left(), 0), lambda: [contestant.kill() for contestant in contestants])
        timer.start()
        try:
            yield
        except ContestantDiedError:
            if self.seconds_left() > 0:
                raise
            self.left_out.append(what)
            print(f"{what}: stopped, the minutes are over", flush=True)
        finally:
            timer.cancel()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether about `seconds` are left; else `what` is noted as left out."""
        if self.seconds_left() >= seconds:
            return True
        self.left_out.append(what)
        print(f"{what}: left out, {max(self.seconds_left(), 0):.0f} s are not enough", flush=True)
        return False


class Worker(Contestant):
    """A process that prepares one case after another (`gpu_workers.work`)."""

    def prepare(self, case: Case) -> float:
        """Compile the case; seconds that took."""
        return self._ask(json.dumps({"prepare": dataclasses.asdict(case)}))["seconds"]

    def measure(self, kind: str) -> float:
        """Seconds per call."""
        return self._ask(json.dumps({"run": kind}))["seconds"]


@contextmanager
def workers(names: Sequence[str], settings: Settings) -> Iterator[dict[str, Worker]]:
    """One process per framework, for as many cases as there are."""
    options = ["--seconds", str(settings.seconds), "--torch-mode", settings.torch_mode or ""]
    started = {name: Worker(name, "benchmarks.gpu", options, _environment()) for name in names}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.kill()


def _environment() -> dict[str, str]:
    """The frameworks share one device: neither may take all of its memory at once."""
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def take_turns(case: Case, contestants: dict[str, Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds per call, by framework and kind; `compile` is the preparation."""
    results = {name: {"compile": worker.prepare(case)} for name, worker in contestants.items()}
    for kind in ("throughput", "latency"):
        runs: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, worker in contestants.items():
                runs[name].append(worker.measure(kind))
        for name, seconds in runs.items():
            results[name][kind] = statistics.median(seconds)
    return results


def inference(settings: Settings, clock: Clock) -> list[str]:
    """Ours alone, then beside PyTorch's, precision by precision; phrases for the row in RESULTS.md."""
    names = ["ours", "torch.compile" if settings.torch_mode else "torch"]
    model, phrases = settings.models[0] if settings.models else "RepVGG-A0", []
    print(f"\n{model}, {settings.image_size}x{settings.image_size}, inputs on the device")
    print(f"{'':9} {'batch':>6} {'':14} {'images/s':>10} {'ratio':>7} {'ms a call':>10} {'ratio':>7} {'compile s':>10}")
    with tempfile.TemporaryDirectory() as folder, workers(names, settings) as started:
        write_files(Case(folder, model, 1, settings.image_size), onnx=False)
        cases = [
            Case(folder, model, batch_size, settings.image_size, *PRECISIONS[precision])
            for precision in settings.precisions
            for batch_size in settings.batch_sizes
        ]
        for contestants, least in ((names[:1], 15), (names, 60)):
            done = []
            for case in cases:
                what = f"{' and '.join(contestants)}: {precision_of(case)} at batch {case.batch_size}"
                if clock.allows(what, least if settings.torch_mode else 0):
                    with clock.stops(what, list(started.values())):
                        results = take_turns(case, {name: started[name] for name in contestants}, settings.rounds)
                        print_inference(case, results)
                        done.append(inference_phrase(case, results))
            if done:
                phrases.append(f"{model}, images/s and latency, {' / '.join(contestants)}: " + "; ".join(done))
    return phrases


def precision_of(case: Case) -> str:
    """`bfloat16`, `tf32` or `float32`."""
    return "tf32" if case.tf32 else case.dtype


def ratios(results: dict[str, dict[str, float]], kind: str) -> str:
    """How many times as fast ours is; empty if it ran alone."""
    ours, *others = (seconds[kind] for seconds in results.values())
    return f"{others[0] / ours:.2f} x" if others else ""


def print_inference(case: Case, results: dict[str, dict[str, float]]) -> None:
    """One line per contestant."""
    for name, own in results.items():
        through, latency = (ratios(results, kind) if name == "ours" else "" for kind in ("throughput", "latency"))
        print(
            f"{precision_of(case):9} {case.batch_size:6} {name:14} {case.batch_size / own['throughput']:10.0f} "
            f"{through:>7} {1e3 * own['latency']:10.3f} {latency:>7} {own['compile']:10.1f}",
            flush=True,
        )


def inference_phrase(case: Case, results: dict[str, dict[str, float]]) -> str:
    """The same for the row."""
    rates = " / ".join(f"{case.batch_size / own['throughput']:.0f}" for own in results.values())
    latencies = " / ".join(f"{1e3 * own['latency']:.2f}" for own in results.values())
    through, latency = (ratios(results, kind) for kind in ("throughput", "latency"))
    return (
        f"{precision_of(case)} {case.batch_size}: {rates}{through and f' ({through})'}, "
        f"{latencies} ms{latency and f' ({latency})'}"
    )


def headlines(settings: Settings, clock: Clock) -> list[str]:
    """RepVGG beside the ResNet of its accuracy, both under JAX."""
    batch_size, done = max(settings.batch_sizes[:2]), []
    with tempfile.TemporaryDirectory() as folder, workers(["ours"], settings) as started:
        for name, resnet, published in HEADLINES if settings.torch_mode else HEADLINES[:1]:
            for precision in settings.precisions[:2]:
                if not clock.allows(f"{name} beside {resnet}, {precision}", 20 if settings.torch_mode else 0):
                    continue
                dtype, tf32 = PRECISIONS[precision]
                case = Case(folder, name, batch_size, settings.image_size, dtype, tf32)
                write_files(case, onnx=False)
                cases = (case, dataclasses.replace(case, model=resnet))
                ours, theirs = (
                    batch_size / take_turns(c, started, settings.rounds)["ours"]["throughput"] for c in cases
                )
                phrase = (
                    f"{name} {ours:.0f} images/s, {resnet} {theirs:.0f}: {ours / theirs - 1:+.0%} in {precision} at "
                    f"batch {batch_size} (paper: {published})"
                )
                print(phrase, flush=True)
                done.append(phrase)
    return done


def training(settings: Settings, clock: Clock) -> list[str]:
    """The train step beside PyTorch's."""
    names = ["ours", "torch.compile" if settings.torch_mode else "torch"]
    print(f"\n{'train step':12} {'batch':>6} {'':14} {'ms':>9} {'images/s':>9} {'ratio':>7} {'peak GB':>8}")
    done = []
    for model, batch_size in settings.training:
        if not clock.allows(f"train step of {model}", 150 if settings.torch_mode else 0):
            continue
        options = ["--model", model, "--batch-size", str(batch_size), "--image-size", str(settings.image_size)]
        begin, contestants = time.monotonic(), []
        with clock.stops(f"train step of {model}", contestants):
            for name in names:
                contestants.append(Contestant(name, "benchmarks.train_step", options, _environment(), ready=False))
                contestants[-1].expect_ready()
            compiled = time.monotonic() - begin
            alternate(contestants, settings.rounds)
        if not all(contestant.summary for contestant in contestants):
            continue
        seconds = {c.name: statistics.median(run["seconds"] for run in c.runs) for c in contestants}
        ratio = seconds[names[1]] / seconds["ours"]
        for contestant in contestants:
            own = seconds[contestant.name]
            print(
                f"{model:12} {batch_size:6} {contestant.name:14} {1e3 * own:9.1f} {batch_size / own:9.0f} "
                f"{f'{ratio:.2f} x' if contestant.name == 'ours' else '':>7} {contestant.summary['bytes'] / 1e9:8.2f}",
                flush=True,
            )
        share = 100 * contestants[0].summary["utilization_a_second"] / seconds["ours"]
        print(f"{model:12} model FLOP utilisation {share:.1f} %; both compiled in {compiled:.0f} s", flush=True)
        done.append(
            f"{model} at {batch_size}: {batch_size / seconds['ours']:.0f} / {batch_size / seconds[names[1]]:.0f} "
            f"({ratio:.2f} x), {share:.0f} % of the peak FLOP/s"
        )
    return [f"train step, images/s ours / {names[1]}: " + "; ".join(done)] if done else []


def correctness(settings: Settings, clock: Clock) -> list[str]:
    """Every variant; names what is beyond rounding.

    Raises:
      SystemExit: anything is.
    """
    if not clock.allows("correctness", 60 if settings.torch_mode else 0):
        return []
    # Any algorithm will do here: measuring them for a hundred layers would take most of the minutes.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    models = json.dumps(list(settings.models))
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "correctness", "--models", models]
    command += ["--image-size", str(settings.check_size)]
    run = subprocess.run(command, env={**_environment(), "XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit("the correctness checks did not finish")
    report = json.loads(run.stdout.splitlines()[-1])
    wrong = [f"train step: {what} {report['train_step'][what]:.1e}" for what in STEP_LIMITS]
    wrong = [
        text
        for text, what in zip(wrong, STEP_LIMITS, strict=True)
        if not report["train_step"][what] <= STEP_LIMITS[what]
    ]
    print(f"{'relative difference':18} {'deploy form':>12} {'bfloat16':>9} {'PyTorch':>9} {'from file':>10}")
    for name, row in report["variants"].items():
        print(
            f"{name:18} {row['deploy']:12.1e} {row['bfloat16']:9.1e} {row['torch']:9.1e} "
            f"{'the same' if row['file'] else 'DIFFERS':>10}"
        )
        wrong += [f"{name}: {what} {row[what]:.1e}" for what, limit in LIMITS.items() if not row[what] <= limit]
        wrong += [] if row["file"] else [f"{name}: other logits from its file"]
    step = ", ".join(f"{what} {value:.1e}" for what, value in report["train_step"].items())
    print(f"one train step against the host's CPU, relative differences: {step}", flush=True)
    if wrong:
        raise SystemExit("beyond rounding: " + "; ".join(wrong))
    rows = report["variants"].values()
    worst = ", ".join(f"{what} {max(row[what] for row in rows):.0e}" for what in LIMITS)
    return [f"correctness of {len(rows)} variants, largest relative difference: {worst}; train step {step}"]


def profile(settings: Settings, clock: Clock) -> list[str]:
    """The five largest kernels of the first training case."""
    model, batch_size = settings.training[0]
    if not clock.allows("profile", 60 if settings.torch_mode else 0):
        return []
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "profile", "--models", json.dumps([model])]
    command += ["--image-size", str(settings.image_size), "--batch-size", str(batch_size)]
    run = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit("the profile did not finish")
    kernels = json.loads(run.stdout.splitlines()[-1])
    print(f"\nkernels of a train step of {model}, batch {batch_size}")
    for name, share in kernels:
        print(f"{100 * share:5.1f} %  {name[:100]}", flush=True)
    return [f"largest kernels of {model}: " + ", ".join(f"{name[:60]} {share:.0%}" for name, share in kernels[:5])]


def facts() -> dict[str, Any]:
    """What `gpu_workers.device_facts` measures, in a process that gives the memory back."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "facts"]
    run = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def append_row(path: Path, device: dict[str, Any], phrases: Sequence[str], clock: Clock) -> None:
    """Add a dated row after the last one of the table."""
    left_out = [f"left out for want of time: {', '.join(clock.left_out)}"] if clock.left_out else []
    ceilings = f"{device['product_tflops']:.0f} TFLOP/s bfloat16 product, {device['copy_gb_per_second']:.0f} GB/s copy"
    text = "; ".join([*phrases, *left_out]).replace("|", "/")
    date = datetime.datetime.now(datetime.UTC).date()
    row = f"| {date} | `gpu.py` | one {device['device']} ({ceilings}) | {device['versions']} | {text} |"
    lines = path.read_text(encoding="utf-8").splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("|"))
    path.write_text("\n".join([*lines[: last + 1], row, *lines[last + 1 :]]) + "\n", encoding="utf-8")


def serve(arguments: argparse.Namespace) -> None:
    """Be one of the processes that this script starts."""
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
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--minutes", type=float, help="how long all of it may take")
    parser.add_argument("--training-models", nargs="+", help="which of the train steps to measure")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS))
    parser.add_argument("--batch-sizes", nargs="+", type=int)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"), help="table to add to")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small images; records nothing")
    for internal in ("--worker", "--models", "--torch-mode"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--image-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        serve(arguments)
        return

    settings = DRY if arguments.dry else FULL
    changes = {
        "minutes": arguments.minutes,
        "precisions": arguments.precisions,
        "batch_sizes": arguments.batch_sizes,
        "training": [case for case in settings.training if case[0] in (arguments.training_models or ())],
    }
    settings = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value})
    clock, phrases = Clock(settings.minutes), []
    device = facts()
    print(", ".join(f"{name}: {value if isinstance(value, str) else round(value)}" for name, value in device.items()))
    measure = {function.__name__: function for function in (correctness, headlines, profile, inference, training)}
    for section in SECTIONS:
        if section in arguments.sections:
            phrases += measure[section](settings, clock)
    if not arguments.dry:
        append_row(arguments.results, device, phrases, clock)
    print(f"{60 * settings.minutes - clock.seconds_left():.0f} s", flush=True)


if __name__ == "__main__":
    main()
