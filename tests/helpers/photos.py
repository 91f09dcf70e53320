"""Small photographs, and folders of them."""

import io
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_image

PHOTO = Image.fromarray(load_sample_image("china.jpg"))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_photos(folder: Path, count: int, offset: int = 0) -> None:
    """Write `count` different crops of a photograph, in two classes and several sizes."""
    for number in range(count):
        corner = 7 * (number + offset)
        cut = PHOTO.crop((corner, corner // 2, corner + 60 + number, corner // 2 + 48))
        path = folder / ("pagoda" if number % 2 else "garden") / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(cut, "JPEG"))
