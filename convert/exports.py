"""Outputs for other runtimes: each is run and compared with JAX before it is put in place."""

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
"""Taken from a folder, in order of name."""

Batch = tuple[str, np.ndarray]
"""What the images are, and the images: float32 `[N, H, W, C]`, normalised."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format for another runtime.

    Attributes:
      write: `write(path, model, variables, …)`.
      run: `run(path, images)` gives logits, and is called after the program that computed them.
      layout: of the input, where the user does not say.
      check_installed: raises ExportError where a library is missing.
      folder: whether it is a folder and not a file.
    """

    write: Callable[..., None]
    run: Callable[[Path, np.ndarray], np.ndarray]
    layout: InputLayout
    check_installed: Callable[[], None] = lambda: None
    folder: bool = False

    def check(self, path: str, *, overwrite: bool = False) -> None:
        """Raise RepVGGError where writing to `path` would, as far as that shows beforehand."""
        self.check_installed()
        if not self.folder:
            check_target(path)
        elif in_bucket(path) or not (overwrite and os.path.lexists(path)):
            check_new_folder(path)


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute by ONNX Runtime, or where that is not installed by onnx's own reference, which is slow."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
    (logits,) = session.run(None, {"images": images})
    return np.asarray(logits)


def stablehlo_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute by JAX, from the file alone."""
    return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images))


def saved_model_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Compute by TensorFlow."""
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    return signature(images=tf.constant(images))["logits"].numpy()


ONNX = Format(rv.export_onnx, onnx_logits, "NCHW", check_onnx_installed)
STABLEHLO = Format(rv.export_stablehlo, stablehlo_logits, "NHWC")
SAVED_MODEL = Format(rv.export_saved_model, saved_model_logits, "NHWC", check_tensorflow_installed, folder=True)
FORMATS = {".onnx": ONNX, ".stablehlo": STABLEHLO, ".bin": STABLEHLO, ".savedmodel": SAVED_MODEL}


def choose_format(output: str) -> Format | None:
    """Return the format by suffix, or a final slash for a SavedModel; None for anything else, such as weight files."""
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
    """Write `output` if it computes what JAX does, and say how near it comes.

    Args:
      output: file or folder to write.
      chosen: its format.
      model, variables: deploy form.
      layout: of the input.
      preprocessing: of the images, which tells their size.
      class_names: names by class index. Goes into ONNX files only.
      free_size: leave height and width free, in ONNX files.
      batches: images to compare on.
      tolerance: largest relative difference of the logits that is still rounding.

    Raises:
      ExportError: it computes something else; nothing is written.
      RepVGGError: it cannot be written.
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
    """Return two random images, and real ones: those in `paths`, or else scikit-learn's two photographs.

    Args:
      paths: image files, and folders of which the first images are taken.
      preprocessing: makes input of them.
      channels: that the net takes.
      free_size: also one random image of another size, which is not square.

    Raises:
      DataError: a path that is no image and no folder with images.
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
        words = "2 random images (no real ones: name some with --check-images, or install scikit-learn)"
        return [(words, noise), *batches[1:]]
    return [*batches, (name, normalize(np.stack(pixels), preprocessing))]


def _image_files(path: str) -> list[Path]:
    """Return the file itself, or a folder's first images by name."""
    folder = Path(path)
    if not is_folder(folder):
        return [folder]
    return [Path(file) for file in some_image_files(folder)[:MAX_CHECK_IMAGES]]
