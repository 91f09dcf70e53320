"""Libraries that may be missing: what installs each, and the error without it."""

import sys

CORE = ("flatbuffers", "flax", "jax", "jaxlib", "numpy", "PIL", "safetensors", "tyro")
"""Modules that every installation has: without them, Python runs outside of the environment that was installed into."""
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
    """Return a one-line error for a missing library, or None if the module is not one of this package's."""
    name = (error.name or "").partition(".")[0]
    if name in CORE:
        return (
            f"this needs {name}, which {sys.executable} does not have: activate the environment that repvgg-jax is "
            "installed in (after `make demo`: . .venv/bin/activate), or run pip install -e . in your checkout"
        )
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"this needs {name}, which is not installed: {install_hint(extra)}"
    return None
