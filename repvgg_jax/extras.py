"""Optional libraries: the extra that installs each, and the error if one is missing."""

EXTRAS = {
    "train": (
        "array_record",
        "cv2",
        "grain",
        "matplotlib",
        "optax",
        "orbax",
        "rich",
        "simplejpeg",
        "sklearn",
        "tensorboardX",
        "tensorflow_datasets",
    ),
    "torch": ("torch",),
    "hub": ("huggingface_hub",),
    "gcs": ("gcsfs",),
    "s3": ("s3fs",),
    "export": ("onnx", "onnxruntime"),
    "wandb": ("wandb",),
    "dev": ("skimage",),
}
"""Modules that each extra of pyproject.toml installs and this package imports."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra from a checkout, since there is no release on PyPI."""
    return f"pip install -e '.[{extra}]' in your checkout of repvgg-jax"


def missing_library(error: ModuleNotFoundError) -> str | None:
    """Return a one-line error for a missing optional library, or None if the module is not one of them."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"this needs {name}, which is not installed: {install_hint(extra)}"
    return None
