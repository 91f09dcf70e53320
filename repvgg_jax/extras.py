"""Optional libraries: which extra brings which, and what to say where one is missing."""

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
"""The modules that each extra of pyproject.toml brings and we import."""


def install_hint(extra: str) -> str:
    """Return how to install an extra: from a checkout, since no release exists that pip could find."""
    return f"pip install -e '.[{extra}]' in your checkout of repvgg-jax"


def missing_library(error: ModuleNotFoundError) -> str | None:
    """Return one line on the optional library that an import has not found, or None if it is none of them."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"this needs {name}, which is not installed: {install_hint(extra)}"
    return None
