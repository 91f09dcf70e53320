"""Exports to other runtimes. Each export is run and compared with JAX before it appears under its final name."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.errors import DataError, ExportError
from repvgg_jax.export.deploy_net import InputLayout
from repvgg_jax.export.onnx_file import check_onnx_installed
from repvgg_jax.export.saved_model import check_tensorflow_installed
from repvgg_jax.files import check_new_folder, check_target
from repvgg_jax.image_files import some_image_files
from repvgg_jax.paths import in_bucket, is_folder
from repvgg_jax.preprocess import eval_transform, normalize, open_as_input

from .compare import logits_of, relative_difference
from .output import replacing_folder

MAX_CHECK_IMAGES = 16
"""Largest number of images taken from a folder, in the order of `image_files`."""

Batch = tuple[str, np.ndarray]
"""A description of the images, and the images: float32 `[N, H, W, C]`, normalised."""


@dataclasses.dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
      write: `write(path, model, variables, …)` writes the export.
      run: `run(path, images)` returns the logits that the export computes.
      layout: default layout of the input.
      check_installed: raises ExportError if a library is missing.
      folder: whether the export is a folder instead of a file.
    """

    write: Callable[..., None]
    run: Callable[[Path, np.ndarray], np.ndarray]
    layout: InputLayout
    check_installed: Callable[[], None] = lambda: None
    folder: bool = False

    def check(self, path: str, *, overwrite: bool = False) -> None:
        """Raise RepVGGError if it is already clear that writing to `path` would fail."""
        self.check_installed()
        if not self.folder:
            check_target(path)
        elif in_bucket(path) or not (overwrite and os.path.lexists(path)):
            check_new_folder(path)


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute logits with ONNX Runtime, or with the slow reference evaluator of `onnx` if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
    (logits,) = session.run(None, {"images": images})
    return np.asarray(logits)


def stablehlo_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute logits with JAX from the file alone."""
    return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images))


def saved_model_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute logits with TensorFlow."""
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    return signature(images=tf.constant(images))["logits"].numpy()


ONNX = Format(rv.export_onnx, onnx_logits, "NCHW", check_onnx_installed)
STABLEHLO = Format(rv.export_stablehlo, stablehlo_logits, "NHWC")
SAVED_MODEL = Format(rv.export_saved_model, saved_model_logits, "NHWC", check_tensorflow_installed, folder=True)
FORMATS = {".onnx": ONNX, ".stablehlo": STABLEHLO, ".bin": STABLEHLO, ".savedmodel": SAVED_MODEL}


def choose_format(output: str) -> Format | None:
    """Return the export format for a suffix or a trailing slash (SavedModel); None if it is not an export."""
    if output.endswith(("/", os.sep)):
        return SAVED_MODEL
    return FORMATS.get(Path(output).suffix)


def write_export(
    output: str,
    chosen: Format,
    model: rv.RepVGG,
    variables: Any,
    *,
    layout: InputLayout,
    preprocessing: rv.Preprocessing,
    class_names: tuple[str, ...] | None,
    free_size: bool,
    batches: Iterable[Batch],
    tolerance: float,
) -> str:
    """Write an export, keep it only if it agrees with JAX, and return a summary of the differences.

    Args:
      output: file or folder to write.
      chosen: export format.
      model: model in deploy form.
      variables: variables of `model`.
      layout: input layout of the export.
      preprocessing: preprocessing of the images, including their size.
      class_names: names by class index; stored in ONNX files only.
      free_size: accept any height and width; ONNX files only.
      batches: images for the comparison with JAX.
      tolerance: largest relative difference between the logits that is accepted as rounding.

    Raises:
      ExportError: the export differs from JAX; nothing is written.
      RepVGGError: the output cannot be written.
    """
    measured = []

    def check(written: Path) -> None:
        for name, images in batches:
            expected = logits_of(model, variables, images)
            laid_out = images if layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
            difference = relative_difference(expected, chosen.run(written, laid_out))
            if np.isnan(difference):
                raise ExportError(f"logits of {output} or of JAX are NaN or infinite on {name}; nothing written")
            if not difference <= tolerance:
                raise ExportError(
                    f"{output} differs from JAX by {difference:.1e} (relative) on {name}; nothing written"
                )
            measured.append(f"{difference:.1e} on {name}")

    options: dict[str, Any] = dict(input_layout=layout, preprocessing=preprocessing, check=check)
    if chosen is ONNX:
        options |= dict(class_names=class_names, dynamic_size=free_size)
    with replacing_folder(output) if chosen.folder else contextlib.nullcontext(output) as target:
        chosen.write(target, model, variables, **options)
    return f"relative difference from JAX {', '.join(measured)}"


def check_batches(
    paths: tuple[str, ...], preprocessing: rv.Preprocessing, channels: int, free_size: bool = False
) -> list[Batch]:
    """Return two random images, and real ones: those in `paths`, or scikit-learn's two photographs if it is empty.

    Args:
      paths: image files, and folders from which the first images are taken.
      preprocessing: preprocessing of the images.
      channels: number of input channels of the net.
      free_size: add one random image of another, non-square size.

    Raises:
      DataError: a path is neither an image nor a folder of images.
    """
    size = preprocessing.image_size
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, size, size, channels)).astype(np.float32)
    batches = [("2 random images", noise)]
    if free_size:
        height, width = size + 32, size // 2 + 17
        other = rng.normal(size=(1, height, width, channels)).astype(np.float32)
        batches.append((f"a random image of {height}x{width}", other))
    if channels != preprocessing.channels:
        if paths:
            raise DataError(f"the net takes {channels} channels; image files have 1 or 3")
        return batches
    if paths:
        pixels = [open_as_input(file, preprocessing) for path in paths for file in _image_files(path)]
        name = f"{len(pixels)} given image{'s' if len(pixels) > 1 else ''}"
    elif importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_sample_images

        mode = "RGB" if channels == 3 else "L"
        photographs = [Image.fromarray(pixels).convert(mode) for pixels in load_sample_images().images]
        pixels = [eval_transform(photograph, preprocessing) for photograph in photographs]
        name = "2 photographs"
    else:
        name = "2 random images (no real ones: pass some with --check-images, or install scikit-learn)"
        return [(name, noise), *batches[1:]]
    return [*batches, (name, normalize(np.stack(pixels), preprocessing))]


def _image_files(path: str) -> list[Path]:
    """Return the file itself, or the first `MAX_CHECK_IMAGES` images of a folder."""
    folder = Path(path)
    if not is_folder(folder):
        return [folder]
    return [Path(file) for file in some_image_files(folder)[:MAX_CHECK_IMAGES]]
