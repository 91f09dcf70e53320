"""What a file under other people's names cannot hold, in a JSON file beside it: `w.pth.json` beside `w.pth`.

The side file names the file that it belongs to by size and by the CRC-32 of its end: the end of a PyTorch file lists
the checksums of everything in it, and that of any other file is weights. So whoever writes other weights under the
old name, by whatever means, does not get the old preprocessing.
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
    """Return where the side file of `path` is."""
    return place(f"{os.fspath(path)}.json")


def lost(header: Header, in_channels: int) -> str:
    """Say what of `header` shows in no key and no shape of a foreign file; empty if nothing is lost."""
    variant = header.variant
    plain: dict[str, Any] = {"strides": (2, 2, 2, 2, 2), "output_stride": 32, "activation": "relu"}
    if header.form == TRAINING:
        plain["epsilon"] = BN_EPSILON
    values = {name: getattr(variant, name) for name in plain}
    words = [f"{name} {getattr(v, '__name__', v)}" for name, v in values.items() if v != plain[name]]
    # What a reader takes a file for that says nothing.
    inferred = next((v for v in VARIANTS.values() if same_network(v, variant)), Variant((1, 1, 1, 1), (1, 1, 1, 1, 1)))
    assumed, wanted = default_preprocessing(inferred, in_channels).to_dict(), header.preprocessing.to_dict()
    words += [name for name, value in wanted.items() if value != assumed[name]]
    return ", ".join(words + ["class_names"] * (header.class_names is not None))


def check_side_file(path: str | os.PathLike) -> None:
    """Refuse to write a side file over somebody else's JSON.

    Raises:
      WeightsError: there is one.
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
    """Yield a temporary path for a foreign weight file, put in place together with the side file that it needs.

    The side file comes first: whatever happens in between, it never speaks for the file that was there before.

    Raises:
      WeightsError: the side file would take the place of somebody else's JSON.
      RepVGGError: one of them cannot be written.
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
        message = f"{path} cannot say {words}: written to {side}, which load_weights reads with it; keep them together"
        warnings.warn(message, WeightsWarning, stacklevel=4)


def with_side_file(
    info: WeightsInfo, local: Path, expected: Variant | None, num_tensors: int
) -> tuple[WeightsInfo, str | None]:
    """Return `info` with what the side file of `local` adds, if there is one, and what a user should hear about it.

    Args:
      info: what the file itself shows.
      local: the weight file.
      expected: a variant that the caller gave; it is kept, all but a usual epsilon.
      num_tensors: in the weight file.

    Raises:
      WeightsError: the side file is damaged, of a later release, or of a net whose activation is a function, which only
        `expected` can say.
    """
    side = side_path(local)
    content = _read(side)
    if content is None:
        return info, None
    if not content:
        return info, f"{side} cannot be read, and is passed over"
    passed_over = f"{side} is passed over: it was written for another file than {local} is now"
    if content.get(FILE) != _fingerprint(local):
        return info, passed_over
    with refusing_damage(f"cannot read {side}, which belongs to {local}; fix or remove it: damaged"):
        header = Header.from_json(content[KEY], f"{side}", num_tensors, expected)
    same = (header.num_classes, IS_DEPLOY.get(header.form)) == (info.num_classes, info.deploy)
    if not same or not same_network(header.variant, info.variant):
        return info, passed_over
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
    """Return the content of a side file; None if there is none, or one that is not ours; empty if it cannot be read."""
    try:
        if not side.is_file():
            return None
        if (side.size() if isinstance(side, BucketPath) else side.stat().st_size) > MAX_BYTES:
            return {}
        content = json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get(KEY), dict) else None
