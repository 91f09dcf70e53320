"""Sections of `benchmarks.gpu`; each prints its measurements and returns phrases for the row in RESULTS.md."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .contest import Contestant, alternate
from .gpu_budget import PRECISIONS, Clock, Settings, environment
from .inference import HEADLINES, Case, write_files

LIMITS = {"deploy": 1e-5, "bfloat16": 5e-2, "torch": 1e-5}
"""Largest relative differences of logits that count as rounding; the last two are for deep nets with random weights."""
STEP_LIMITS = {"loss": 1e-5, "update": 1e-2, "statistics": 1e-5}


class Worker(Contestant):
    """A process that prepares one case after another (`gpu_workers.work`)."""

    def prepare(self, case: Case) -> float:
        """Compile the case; return the seconds that this took."""
        return self._ask(json.dumps({"prepare": dataclasses.asdict(case)}))["seconds"]

    def measure(self, kind: str) -> float:
        """Return the seconds per call."""
        return self._ask(json.dumps({"run": kind}))["seconds"]


@contextmanager
def workers(names: Sequence[str], settings: Settings) -> Iterator[dict[str, Worker]]:
    """Start one process per framework, for all cases."""
    options = ["--seconds", str(settings.seconds), "--torch-mode", settings.torch_mode or ""]
    started = {name: Worker(name, "benchmarks.gpu", options, environment()) for name in names}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.kill()


def take_turns(case: Case, contestants: dict[str, Worker], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds per call by framework and kind; `compile` is the preparation."""
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
    """Measure inference by precision, first this library alone, then compared with PyTorch."""
    names = ["ours", "torch.compile" if settings.torch_mode else "torch"]
    model, phrases = settings.models[0] if settings.models else "RepVGG-A0", []
    print(f"\n{model}, {settings.image_size}x{settings.image_size}, inputs on the device")
    print(f"{'':9} {'batch':>6} {'':14} {'images/s':>10} {'ratio':>7} {'ms/call':>10} {'ratio':>7} {'compile s':>10}")
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
    """Return `bfloat16`, `tf32` or `float32`."""
    return "tf32" if case.tf32 else case.dtype


def ratios(results: dict[str, dict[str, float]], kind: str) -> str:
    """Return how many times as fast this library is; empty if it ran alone."""
    ours, *others = (seconds[kind] for seconds in results.values())
    return f"{others[0] / ours:.2f} x" if others else ""


def print_inference(case: Case, results: dict[str, dict[str, float]]) -> None:
    """Print one line per contestant."""
    for name, seconds in results.items():
        through, latency = (ratios(results, kind) if name == "ours" else "" for kind in ("throughput", "latency"))
        print(
            f"{precision_of(case):9} {case.batch_size:6} {name:14} {case.batch_size / seconds['throughput']:10.0f} "
            f"{through:>7} {1e3 * seconds['latency']:10.3f} {latency:>7} {seconds['compile']:10.1f}",
            flush=True,
        )


def inference_phrase(case: Case, results: dict[str, dict[str, float]]) -> str:
    """Return the measurements of one case for the row in RESULTS.md."""
    rates = " / ".join(f"{case.batch_size / seconds['throughput']:.0f}" for seconds in results.values())
    latencies = " / ".join(f"{1e3 * seconds['latency']:.2f}" for seconds in results.values())
    through, latency = (ratios(results, kind) for kind in ("throughput", "latency"))
    return (
        f"{precision_of(case)} {case.batch_size}: {rates}{through and f' ({through})'}, "
        f"{latencies} ms{latency and f' ({latency})'}"
    )


def headlines(settings: Settings, clock: Clock) -> list[str]:
    """Compare RepVGG with the ResNet of the same accuracy, both with JAX."""
    batch_size, done = max(settings.batch_sizes[:2]), []
    with tempfile.TemporaryDirectory() as folder, workers(["ours"], settings) as started:
        for name, resnet, published in HEADLINES if settings.torch_mode else HEADLINES[:1]:
            for precision in settings.precisions[:2]:
                if not clock.allows(f"{name} and {resnet}, {precision}", 20 if settings.torch_mode else 0):
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
    """Compare the train step with PyTorch's."""
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
                contestants.append(Contestant(name, "benchmarks.train_step", options, environment(), ready=False))
                contestants[-1].expect_ready()
            compiled = time.monotonic() - begin
            alternate(contestants, settings.rounds)
        if not all(contestant.summary for contestant in contestants):
            continue
        seconds = {c.name: statistics.median(run["seconds"] for run in c.runs) for c in contestants}
        ratio = seconds[names[1]] / seconds["ours"]
        for contestant in contestants:
            step = seconds[contestant.name]
            print(
                f"{model:12} {batch_size:6} {contestant.name:14} {1e3 * step:9.1f} {batch_size / step:9.0f} "
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
    """Check every variant, and print the differences.

    Raises:
      SystemExit: a difference is larger than rounding; the message lists all of them.
    """
    if not clock.allows("correctness", 60 if settings.torch_mode else 0):
        return []
    # Any algorithm will do here; autotuning a hundred layers would take most of the time.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    models = json.dumps(list(settings.models))
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "correctness", "--models", models]
    command += ["--image-size", str(settings.check_size)]
    run = subprocess.run(command, env={**environment(), "XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True)
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
    print(f"one train step compared with the host's CPU, relative differences: {step}", flush=True)
    if wrong:
        raise SystemExit("larger than rounding: " + "; ".join(wrong))
    rows = report["variants"].values()
    worst = ", ".join(f"{what} {max(row[what] for row in rows):.0e}" for what in LIMITS)
    return [f"correctness of {len(rows)} variants, largest relative difference: {worst}; train step {step}"]


def profile(settings: Settings, clock: Clock) -> list[str]:
    """Measure the duration of a train step of the first case, and that of its kernels."""
    model, batch_size = settings.training[0]
    if not clock.allows("profile", 60 if settings.torch_mode else 0):
        return []
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "profile", "--models", json.dumps([model])]
    command += ["--image-size", str(settings.image_size), "--batch-size", str(batch_size)]
    run = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit("the profile did not finish")
    report = json.loads(run.stdout.splitlines()[-1])
    kernels, rate = report["kernels"], batch_size / report["seconds"]
    step = f"train step of {model}, batch {batch_size}: {1e3 * report['seconds']:.2f} ms, {rate:.0f} images/s"
    print(f"\n{step}; its kernels:")
    for name, share in kernels:
        print(f"{100 * share:5.1f} %  {name[:100]}", flush=True)
    return [f"{step}; largest kernels: " + ", ".join(f"{name[:60]} {share:.0%}" for name, share in kernels[:5])]


def cifar10(settings: Settings, clock: Clock) -> list[str]:
    """Train the preset of that name at full length, and report the minutes and the fused net's accuracy.

    Raises:
      SystemExit: the training fails.
    """
    if settings.photographs is None or not clock.allows("cifar10", 240 if settings.torch_mode else 0):
        return []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "train.main", "--preset", "cifar10", "--data", str(settings.photographs)]
        command += [*settings.cifar10, "--workdir", f"{folder}/run"]
        try:
            run = subprocess.run(
                command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=max(clock.seconds_left(), 1)
            )
        except subprocess.TimeoutExpired:
            clock.left_out.append("cifar10")
            print("cifar10: stopped, the time is over", flush=True)
            return []
    if run.returncode:
        raise SystemExit("the training on CIFAR-10 failed")
    minutes = (time.monotonic() - begin) / 60
    top1 = json.loads(run.stdout.splitlines()[-1])["test_top1_deploy_form"]
    phrase = f"CIFAR-10 ({' '.join(settings.cifar10)}): top-1 {100 * top1:.2f} % in {minutes:.1f} minutes"
    print(phrase, flush=True)
    return [phrase]
