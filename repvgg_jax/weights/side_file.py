"""Side files: `w.pth.json` next to `w.pth` holds what the formats of other families cannot.

The side file identifies its weight file by size and by the CRC-32 of its end. The end of a PyTorch file lists the
checksums of everything in it; the end of any other file is weights. If the weight file is overwritten with other
weights, by whatever means, the side file is therefore no longer applied.
"""

import dataclasses
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..files import atomic_path, check_target
from ..net.kernel_algebra import BN_EPSILON
from ..net.variants import VARIANTS, Variant
from ..paths import Place, exists, place
from ..storage import BucketPath
from .header import IS_DEPLOY, TRAINING, Header, refusing_damage
from .identify import same_network, with_stated_epsilon
from .info import WeightsInfo, WeightsWarning, default_preprocessing

KEY, FILE = "repvgg_jax", "file"
MAX_BYTES = 16 << 20
END_BYTES = 64 << 10


def side_path(path: str | os.PathLike) -> Place:
    """Return the path of the side file of `path`."""
    return place(f"{os.fspath(path)}.json")


def lost(header: Header, in_channels: int) -> str:
    """Return in words what a foreign file's keys and shapes do not show of `header`; empty if nothing is lost."""
    variant = header.variant
    plain: dict[str, Any] = {"strides": (2, 2, 2, 2, 2), "output_stride": 32, "activation": "relu"}
    if header.form == TRAINING:
        plain["epsilon"] = BN_EPSILON
    values = {name: getattr(variant, name) for name in plain}
    words = [f"{name} {getattr(v, '__name__', v)}" for name, v in values.items() if v != plain[name]]
    # The defaults that a reader assumes without a side file.
    inferred = next((v for v in VARIANTS.values() if same_network(v, variant)), Variant((1, 1, 1, 1), (1, 1, 1, 1, 1)))
    assumed, wanted = default_preprocessing(inferred, in_channels).to_dict(), header.preprocessing.to_dict()
    words += [name for name, value in wanted.items() if value != assumed[name]]
    return ", ".join(words + ["class_names"] * (header.class_names is not None))


def check_side_file(path: str | os.PathLike) -> None:
    """Check that the side file of `path` can be written, and that it would not overwrite an unrelated JSON file.

    Raises:
      WeightsError: an unrelated file of that name exists.
      RepVGGError: the side file cannot be written.
    """
    side = side_path(path)
    if exists(side) and not _read(side):
        raise WeightsError(
            f"cannot write {side}, which is to hold what {path} cannot: a file of that name exists and is not ours"
        )
    check_target(side)


@contextmanager
def writing(path: str | os.PathLike, header: Header, in_channels: int) -> Iterator[Path]:
    """Yield a temporary path for a foreign weight file, put in place together with its side file if one is needed.

    The side file is replaced first. If writing is interrupted between the two, its fingerprint does not match the old
    weight file, and it is ignored.

    Raises:
      WeightsError: the side file would overwrite an unrelated JSON file.
      RepVGGError: one of the files cannot be written.
    """
    words, side = lost(header, in_channels), side_path(path)
    is_ours = bool(_read(side))
    if words:
        check_side_file(path)
    with atomic_path(path) as temporary:
        yield temporary
        if words or is_ours:
            content = {KEY: header.to_json(), FILE: _fingerprint(temporary)}
            with atomic_path(side) as beside:
                beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if words:
        message = f"{path} cannot hold {words}: written to {side}, which load_weights reads with it; keep them together"
        warnings.warn(message, WeightsWarning, stacklevel=4)


def with_side_file(
    info: WeightsInfo, local: Path, expected: Variant | None, num_tensors: int
) -> tuple[WeightsInfo, str | None]:
    """Return `info` completed from the side file of `local`, if there is one, and a note for the user, if any.

    Args:
      info: description from the weight file alone.
      local: the weight file.
      expected: the caller's variant, which takes precedence except over the side file's epsilon, if its own is the
        default.
      num_tensors: number of tensors in the weight file.

    Raises:
      WeightsError: the side file is damaged or of a later release, or the activation is a function and there is no
        `expected` to supply it.
    """
    side = side_path(local)
    content = _read(side)
    if content is None:
        return info, None
    if not content:
        return info, f"{side} cannot be read and is ignored"
    mismatch = f"{side} is ignored: it was written for another file than {local} is now"
    if content.get(FILE) != _fingerprint(local):
        return info, mismatch
    with refusing_damage(f"cannot read {side}, which belongs to {local}; fix or remove it: damaged"):
        header = Header.from_json(content[KEY], f"{side}", num_tensors, expected)
    same = (header.num_classes, IS_DEPLOY.get(header.form)) == (info.num_classes, info.deploy)
    if not same or not same_network(header.variant, info.variant):
        return info, mismatch
    variant = header.variant if expected is None else with_stated_epsilon(expected, header.variant)
    return dataclasses.replace(
        info, variant=variant, preprocessing=header.preprocessing, class_names=header.class_names
    ), None


def _fingerprint(path: Path) -> dict[str, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END_BYTES))
        return {"size": size, "crc32_of_end": zlib.crc32(file.read(END_BYTES))}


def _read(side: Place) -> Mapping[str, Any] | None:
    """Return a side file's content; None if it does not exist or is not a side file; empty if it cannot be read."""
    try:
        if not side.is_file():
            return None
        if (side.size() if isinstance(side, BucketPath) else side.stat().st_size) > MAX_BYTES:
            return {}
        content = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get(KEY), dict) else None
