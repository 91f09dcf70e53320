"""scikit-learn's digits (1797 real 8x8 scans of handwritten digits) as a TFDS data set on disk.

They are written once and then read like any other TFDS data set, so the demo runs the same code as ImageNet.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from repvgg_jax.digits import held_out, scans
from repvgg_jax.errors import DataError
from repvgg_jax.files import scratch_folder

NAME, VERSION = "sklearn_digits", "1.0.0"


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder used instead of `tfds.dataset_builders.store_as_tfds_dataset`, which imports TensorFlow."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    # There are no download checksums next to this file, and TFDS's search for them needs importlib_resources, which
    # it does not declare as a dependency.
    code_path = None

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The digits of scikit-learn (UCI optdigits, test part), 0..16 scaled to 0..255.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        images, labels = scans()
        test = held_out(labels)
        train = np.setdiff1d(np.arange(len(labels)), test)
        splits = {"train": train, "test": test}
        return {name: self._generate_examples(images, labels, indices) for name, indices in splits.items()}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            image = Image.fromarray(images[index])  # encoded by TFDS, which needs TensorFlow for NumPy arrays
            yield index, {"image": image, "label": int(labels[index]), "id": f"digit {index}"}


def prepare(data_dir: Path) -> Path:
    """Write the data set under `data_dir` unless it exists, and return its folder.

    It is written to a temporary folder and renamed, so a killed process leaves no incomplete data set, and two
    processes that write it at the same time both succeed.

    Raises:
      DataError: `data_dir` cannot be written.
    """
    directory = data_dir / NAME / VERSION
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(".digits-", data_dir) as scratch:
            _write(scratch).rename(directory)
    except OSError as error:
        # A folder with content is never overwritten; here, another process has written the same images.
        if directory.is_dir():
            return directory
        raise DataError(
            f"cannot write the digits data set under {data_dir} ({error.strerror or error}); "
            "name a writable folder with --data-dir or TFDS_DATA_DIR"
        ) from error
    return directory


def _write(data_dir: Path) -> Path:
    builder = _Builder(data_dir=data_dir, file_format="array_record")
    # TFDS prints its progress, which 1797 tiny images do not need and which would mix with the command's output.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return Path(builder.data_dir)
