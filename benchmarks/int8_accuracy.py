"""What 8 bits cost in accuracy, by method: `python -m benchmarks.int8_accuracy WORKDIR`.

Trains RepVGG-A0 and the same net of QARepVGG blocks on scikit-learn's digits, fine-tunes the first with
quantisation-aware training, quantises them every way, and evaluates all on distorted copies of the digits that no
training has seen. Everything is kept in WORKDIR; the same command again goes on from there.

With `--cifar10 FOLDER` the nets are the preset `cifar10`'s, trained on real photographs as its recipe says, and
evaluated on the whole test split. Nothing is made hard then.

On digits, the float nets are made hard on purpose, the way in which released RepVGG weights are: before training, the
BN gammas of a tenth of every block's channels are turned down to a tenth. The next block's identity BN divides by the
small deviation of such a channel, so its gamma / sigma is large, and the fused kernel has outliers on its diagonal.
Training starts there and is the digits recipe otherwise, weight decay included. Both nets are treated alike; `easy` is
RepVGG without that.

Each quantised net is exported in QDQ form too, and ONNX Runtime's predictions are compared with JAX's.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import repvgg_jax as rv
from convert.calibration_images import calibration_images
from repvgg_jax.cli import run_command
from repvgg_jax.files import atomic_path
from repvgg_jax.net.branches import BlockKind
from repvgg_jax.preprocess import Preprocessing, decode_image, normalize
from train import data
from train.cluster import stop_signal
from train.data.sources import Source
from train.data.transforms import random_affine
from train.main import train
from train.presets import PRESETS
from train.recipe import Recipe

SIZE = 32
QUIET_SHARE, QUIET = 0.1, 0.1
"""How many of a block's channels are turned down before training, and to what."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure what INT8 costs in accuracy."""

    workdir: tyro.conf.Positional[str]
    """Where runs and results are kept."""
    cifar10: str | None = None
    """A folder with train/CLASS/* and val/CLASS/*; digits if not given."""
    epochs: int | None = None
    """Of the float nets; the preset's if not given."""
    qat_epochs: int = 4
    copies: int = 10
    """Distorted copies of each test digit."""
    calibration_images: int = 256

    @property
    def preset(self) -> Recipe:
        """What the float nets are trained by."""
        preset = PRESETS["digits" if self.cifar10 is None else "cifar10"]
        where = {"data_dir": str(Path(self.workdir) / "data")} if self.cifar10 is None else {"data": self.cifar10}
        return dataclasses.replace(preset, input=dataclasses.replace(preset.input, **where))


@dataclasses.dataclass(frozen=True)
class Net:
    """A float net: its name in the table, its block, whether it is made hard, how it is quantised besides `naive`."""

    name: str
    block: BlockKind
    hard: bool
    methods: tuple[str, ...]


ALL_METHODS = ("per-channel", "equalized", "corrected", "full")
NETS = {
    "digits": (
        Net("repvgg", "repvgg", True, ALL_METHODS),
        Net("qarepvgg", "qarepvgg", True, ("per-channel", "full")),
        Net("easy", "repvgg", False, ("full",)),
    ),
    "cifar10": (
        Net("repvgg", "repvgg", False, ALL_METHODS),
        Net("qarepvgg", "qarepvgg", False, ("per-channel", "full")),
    ),
}
"""By data set; the first is fine-tuned with quantisation-aware training, and is quantised per tensor too."""


def make_hard(model: rv.RepVGG, path: Path) -> None:
    """Write fresh weights with quiet channels."""
    images = np.zeros((1, SIZE, SIZE, 3), np.float32)
    variables: Any = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), images))
    rng = np.random.default_rng(0)
    for name, block in variables["params"].items():
        # Stage 4 has no identity branch, and what reads it is the classifier.
        if not name.startswith("stage") or name.startswith("stage4"):
            continue
        outputs = [block["bn"]] if "bn" in block else [block["rbr_dense"]["bn"], block["rbr_1x1"]["bn"]]
        if "rbr_identity" in block:
            outputs.append(block["rbr_identity"])
        quiet = rng.random(outputs[0]["scale"].shape) < QUIET_SHARE
        for bn in outputs:
            bn["scale"] = bn["scale"] * np.where(quiet, np.float32(QUIET), np.float32(1))
    rv.save_weights(path, model, variables)


def run_config(preset: Recipe, workdir: Path, epochs: int | None, init: Path | None, **changes: Any) -> Recipe:
    """The preset in a folder of its own."""
    optimizer = preset.optimizer
    for name in ("warmup_epochs", "learning_rate"):
        optimizer = dataclasses.replace(optimizer, **{name: changes.pop(name, getattr(optimizer, name))})
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, **changes),
        optimizer=dataclasses.replace(optimizer, epochs=epochs or optimizer.epochs),
        fine_tune=dataclasses.replace(preset.fine_tune, init=None if init is None else str(init)),
        run=dataclasses.replace(preset.run, workdir=str(workdir)),
    )


def trained(workdir: Path, arguments: Arguments, nets: tuple[Net, ...]) -> dict[str, Path]:
    """Weight files of the trained nets by name; `qat` is the first one after quantisation-aware training."""
    files, preset = {}, arguments.preset
    for net in nets:
        init = workdir / f"{net.name}-init.safetensors" if net.hard else None
        if init is not None and not init.exists():
            make_hard(rv.create_model("RepVGG-A0", 10, block=net.block), init)
        finish(run_config(preset, workdir / net.name, arguments.epochs, init, block=net.block))
        files[net.name] = workdir / net.name / "final.safetensors"
    fine_tuning = dict(quantization="qat", learning_rate=0.01, warmup_epochs=0)
    finish(run_config(preset, workdir / "qat", arguments.qat_epochs, files[nets[0].name], **fine_tuning))
    return files | {"qat": workdir / "qat" / "int8.safetensors"}


def finish(config: Recipe) -> None:
    """Train to the end, or leave as SIGTERM asks to."""
    if train(config) is None:
        sys.exit(128 + stop_signal())


def distorted(source: Source, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[N * copies, SIZE, SIZE, 3]` and labels: each image rotated, scaled, sheared and shifted at random."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for index in range(len(source)):
        example = source[index]
        assert isinstance(example.image, bytes)
        image = decode_image(example.image, example.name)
        for _ in range(copies):
            images.append(random_affine(image, rng, SIZE))
            labels.append(example.label)
    return np.stack(images), np.array(labels)


def evaluation_set(arguments: Arguments, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[N, SIZE, SIZE, 3]` and labels: distorted digits, or the test split of CIFAR-10 as it is."""
    spec = arguments.cifar10 or "digits"
    folder = Path(arguments.workdir) / "data"
    source = data.open_dataset(spec, image_size=SIZE, data_dir=folder, evaluation_only=True).test
    if arguments.cifar10 is None:
        return distorted(source, arguments.copies)
    with data.eval_batches(
        source, batch_size=len(source), local_device_count=1, preprocessing=preprocessing
    ) as batches:
        batch = next(batches)
    return batch["image"][0], batch["label"][0]


def quantized_net(path: Path, make: Callable[[], rv.QuantizedNet]) -> rv.QuantizedNet:
    """From the file of an earlier run, if there was one."""
    if not path.exists():
        rv.save_quantized(path, make())
    return rv.load_quantized(path)


def onnxruntime_logits(path: Path, net: rv.QuantizedNet) -> Callable[[np.ndarray], np.ndarray]:
    """What the net's QDQ export at `path` says of images `[N, H, W, C]`."""
    import onnxruntime

    rv.export_quantized_onnx(path, net, image_size=SIZE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0])


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """Accuracy of every net and method on the same images, in per cent."""
    workdir = Path(arguments.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    nets = NETS["digits" if arguments.cifar10 is None else "cifar10"]
    files = trained(workdir, arguments, nets)
    preprocessing = rv.inspect_weights(files[nets[0].name]).preprocessing
    pixels, labels = evaluation_set(arguments, preprocessing)
    images = normalize(pixels, preprocessing)
    calibration = calibration_images(arguments.cifar10 or "digits", preprocessing, arguments.calibration_images)
    rows: list[dict[str, Any]] = []

    def logits(run: Callable[[np.ndarray], Any]) -> np.ndarray:
        return np.concatenate([np.asarray(run(images[start : start + 360])) for start in range(0, len(images), 360)])

    def top1(found: np.ndarray) -> float:
        return 100 * float((found.argmax(-1) == labels).mean())

    def add(net: str, method: str, found: np.ndarray, reference: float, exported: np.ndarray | None = None) -> None:
        row: dict[str, Any] = {"net": net, "method": method, "top1": top1(found), "images": len(images)}
        row["lost"] = reference - row["top1"]
        text = f"| {net} | {method} | {row['top1']:.2f} | {row['lost']:+.2f} |"
        if exported is not None:
            row["onnxruntime_agrees"] = int((exported.argmax(-1) == found.argmax(-1)).sum())
            row["ties"] = int((np.diff(np.sort(found)[:, -2:]) == 0).sum())
            text += f" {row['onnxruntime_agrees']} of {len(images)} alike in ONNX Runtime, {row['ties']} ties |"
        rows.append(row)
        print(text, flush=True)

    def add_quantized(net: str, method: str, path: Path, make: Callable[[], rv.QuantizedNet], reference: float) -> None:
        found = quantized_net(path, make)
        exported = onnxruntime_logits(path.with_suffix(".onnx"), found)
        add(net, method, logits(found), reference, logits(exported))

    for net in nets:
        model, variables = rv.to_deploy(*rv.load_weights(files[net.name]))
        found = logits(functools.partial(jax.jit(model.apply), variables))
        reference = top1(found)
        add(net.name, "float32", found, reference)
        quantized: dict[str, dict[str, Any]] = {name: dict(method=name) for name in ("naive", *net.methods)}
        if net is nets[0]:
            for name in ("equalized", "corrected", "full"):
                quantized[f"per-tensor, {name}"] = dict(method=name, per_channel=False)
        for name, options in quantized.items():
            make = functools.partial(rv.quantize, model, variables, calibration, preprocessing=preprocessing, **options)
            path = workdir / f"{net.name}-{name.replace(', ', '-')}.safetensors"
            add_quantized(net.name, name, path, make, reference)
        if net is nets[0]:
            load = functools.partial(rv.load_quantized, files["qat"])
            path = workdir / f"{net.name}-qat.safetensors"
            add_quantized(net.name, "quantisation-aware training", path, load, reference)
    return rows


def main() -> None:
    """The command; prints rows of a table as they come."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.int8_accuracy")
    rows = measure(arguments)
    with atomic_path(Path(arguments.workdir) / "int8_accuracy.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
