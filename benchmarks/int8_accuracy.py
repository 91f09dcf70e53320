"""Accuracy loss of INT8 by quantisation method: `python -m benchmarks.int8_accuracy WORKDIR`.

This trains RepVGG-A0 and the same net with QARepVGG blocks on scikit-learn's digits, fine-tunes the first with
quantisation-aware training, quantises both with all methods, and evaluates all nets on distorted copies of the test
digits. Everything is kept in WORKDIR; run the same command again to resume.

With `--cifar10 FOLDER`, the nets are those of the preset `cifar10`, trained on real photographs with its recipe and
evaluated on the whole test split. They are not made hard to quantise.

On digits, the float nets are deliberately made as hard to quantise as released RepVGG weights: before training, the BN
gammas of a tenth of every block's channels are reduced to a tenth. The next block's identity BN divides by the small
deviation of such a channel, so its gamma / sigma is large, and the fused kernel has outliers on its diagonal. Training
starts from there and otherwise follows the digits recipe, including weight decay. Both nets are treated alike; `easy`
is RepVGG without this change.

Each quantised net is also exported in QDQ form, and ONNX Runtime's predictions are compared with JAX's.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import repvgg_jax as rv
from convert.calibration_images import calibration_images
from repvgg_jax.cli import run_command
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
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
"""Share of a block's channels whose gammas are reduced before training, and the factor."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the accuracy loss of INT8 by quantisation method."""

    workdir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")]
    """Folder for runs and results."""
    cifar10: str | None = None
    """Measure on CIFAR-10 instead of digits; its folder, with train/CLASS/* and val/CLASS/*."""
    epochs: int | None = None
    """Number of epochs of the float nets. Default: that of the preset."""
    qat_epochs: int = 4
    """Number of epochs of quantisation-aware training."""
    copies: int = 10
    """Number of distorted copies of each test digit."""
    calibration_images: int = 256
    """Number of training images for calibration."""

    @property
    def preset(self) -> Recipe:
        """Recipe of the float nets."""
        preset = PRESETS["digits" if self.cifar10 is None else "cifar10"]
        where = {"data_dir": str(Path(self.workdir) / "data")} if self.cifar10 is None else {"data": self.cifar10}
        return dataclasses.replace(preset, input=dataclasses.replace(preset.input, **where))


@dataclasses.dataclass(frozen=True)
class Net:
    """A float net: name in the table, block, whether it is made hard, and quantisation methods besides `naive`."""

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
"""Nets by data set; the first is also fine-tuned with quantisation-aware training, and quantised per tensor."""


def make_hard(model: rv.RepVGG, path: Path) -> None:
    """Write fresh weights in which a share of the channels have small gammas."""
    images = np.zeros((1, SIZE, SIZE, 3), np.float32)
    variables: Any = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), images))
    rng = np.random.default_rng(0)
    for name, block in variables["params"].items():
        # Stage 4 has no identity branch, and only the classifier reads it.
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
    """Return the preset with changes, in a separate folder."""
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
    """Train the nets and return their weight files by name; `qat` is the first after quantisation-aware training."""
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
    """Train to the end; exit if a signal stops the run."""
    if train(config) is None:
        sys.exit(128 + stop_signal())


def distorted(source: Source, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Return randomly rotated, scaled, sheared and shifted images, uint8 `[N * copies, SIZE, SIZE, 3]`, and labels."""
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
    """Return images, uint8 `[N, SIZE, SIZE, 3]`, and labels: distorted digits, or CIFAR-10's unchanged test split."""
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
    """Return a quantised net, from the file of an earlier run if there is one."""
    if not path.exists():
        rv.save_quantized(path, make())
    return rv.load_quantized(path)


def onnxruntime_logits(path: Path, net: rv.QuantizedNet) -> Callable[[np.ndarray], np.ndarray]:
    """Export the net in QDQ form to `path`; return ONNX Runtime's function from images `[N, H, W, C]` to logits."""
    import onnxruntime

    rv.export_quantized_onnx(path, net, image_size=SIZE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0])


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """Return the accuracy of every net and method on the same images, in per cent."""
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

    def top1(outputs: np.ndarray) -> float:
        return 100 * float((outputs.argmax(-1) == labels).mean())

    def add(net: str, method: str, outputs: np.ndarray, reference: float, exported: np.ndarray | None = None) -> None:
        row: dict[str, Any] = {"net": net, "method": method, "top1": top1(outputs), "images": len(images)}
        row["lost"] = reference - row["top1"]
        text = f"| {net} | {method} | {row['top1']:.2f} | {row['lost']:+.2f} |"
        if exported is not None:
            row["onnxruntime_agrees"] = int((exported.argmax(-1) == outputs.argmax(-1)).sum())
            row["ties"] = int((np.diff(np.sort(outputs)[:, -2:]) == 0).sum())
            text += f" {row['onnxruntime_agrees']} of {len(images)} the same in ONNX Runtime, {row['ties']} ties |"
        rows.append(row)
        print(text, flush=True)

    def add_quantized(net: str, method: str, path: Path, make: Callable[[], rv.QuantizedNet], reference: float) -> None:
        int8_net = quantized_net(path, make)
        exported = onnxruntime_logits(path.with_suffix(".onnx"), int8_net)
        add(net, method, logits(int8_net), reference, logits(exported))

    for net in nets:
        model, variables = rv.to_deploy(*rv.load_weights(files[net.name]))
        outputs = logits(functools.partial(jax.jit(model.apply), variables))
        reference = top1(outputs)
        add(net.name, "float32", outputs, reference)
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
    """Run the command, which prints rows of a table as they are measured."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m benchmarks.int8_accuracy", registry=plain_help())
    rows = measure(arguments)
    with atomic_path(Path(arguments.workdir) / "int8_accuracy.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
