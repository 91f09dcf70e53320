"""Fingerprints of image sources, which show whether two hold the same images, wherever they are stored."""

import zlib

import numpy as np

from repvgg_jax.errors import DataError

from .sources import Source, sample_of


def fingerprint(*parts: str | bytes) -> str:
    """Return the CRC-32 of a sequence of texts and bytes, as eight digits."""
    crc = 0
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        crc = zlib.crc32(encoded, zlib.crc32(len(encoded).to_bytes(8, "little"), crc))
    return f"{crc:08x}"


def data_fingerprint(source: Source) -> str:
    """Return a fingerprint of a sample of the source's images and labels, in order; file names do not count."""
    parts: list[bytes] = []
    for index in sample_of(source):
        try:
            example = source[index]
        except DataError:  # unreadable: reported and skipped when training comes to it
            continue
        parts += [np.ascontiguousarray(example.image).tobytes(), str(example.label).encode()]
    return fingerprint(*parts)
