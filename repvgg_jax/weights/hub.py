"""Weights on the Hugging Face hub: `hf://OWNER/REPOSITORY[@REVISION][/FILE]`, or `hf://VARIANT` for published ones.

Download, cache (`HF_HOME`, `HF_HUB_CACHE`), offline mode (`HF_HUB_OFFLINE=1`), mirrors (`HF_ENDPOINT`) and tokens
(`HF_TOKEN`) are handled by huggingface_hub.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UnknownModelError, WeightsError, shown
from ..extras import install_hint
from ..preprocess import Preprocessing
from . import hub_errors
from .header import refusing_damage
from .info import WeightsInfo, preprocessing_from_file
from .pretrained import MAIN, find_pretrained

SCHEME = "hf://"
FILES = ("model.safetensors", "pytorch_model.bin")
"""File names in timm's repositories, the preferred one first; `push_to_hub` writes only that one."""

MAX_CONFIG_BYTES = 16 << 20

_REVISION = r"(?P<revision>refs/[^/@]+/[^/@]+|[^/@]+)"
_ADDRESS = re.compile(rf"(?P<repository>[^/@]+/[^/@]+)(@{_REVISION})?(/(?P<file>[^@]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_address(path: object) -> bool:
    """Return whether `path` is an address on the hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def require_hub(what: str) -> None:
    """Raise WeightsError if huggingface_hub, which `what` needs, is not installed."""
    try:
        importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise WeightsError(f"{what} needs huggingface_hub: {install_hint('hub')}") from error


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """The target of an address: the first available of `files` in the first available of `revisions`."""

    repository: str
    revisions: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def parse(cls, address: str) -> "HubPlace":
        """Parse a hub address.

        Raises:
          WeightsError: it is not a valid address, or names a variant without weights on the hub.
        """
        name = address.removeprefix(SCHEME)
        with contextlib.suppress(UnknownModelError):
            row = find_pretrained(name)
            return cls(row.repository, row.revisions, (row.file,))
        parts = _ADDRESS.fullmatch(name)
        if parts is None:
            expected = "hf://OWNER/REPOSITORY[@REVISION][/FILE], or hf://VARIANT"
            raise WeightsError(f"{shown(address)} is not a hub address; expected {expected}")
        return cls(parts["repository"], (parts["revision"] or MAIN,), (parts["file"],) if parts["file"] else FILES)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A weight file downloaded from the hub.

    Attributes:
      path: the local copy in the cache.
      config: contents of the repository's `config.json`, if it has one.
      note: remark on the file to show the user, if any.
    """

    path: Path
    config: "HubConfig | None"
    note: str | None = None


def fetch(address: str) -> HubFile:
    """Return a weight file from the hub, downloaded unless it is in the cache, and its repository's configuration.

    Raises:
      WeightsError: huggingface_hub is not installed, the file does not exist, the hub cannot be reached and the cache
        does not have the file, or the download is damaged.
    """
    place = HubPlace.parse(address)
    require_hub(address)
    download = _Download(place.repository)
    try:
        weights, revision = _first_there(place, download)
    except WeightsError:
        raise
    except Exception as error:  # huggingface_hub's HTTP library raises its own exceptions
        names, why = " or ".join(place.files), hub_errors.reason(error, place.repository)
        raise WeightsError(f"cannot fetch {address} ({names}): {why}") from error
    wanted, note = place.revisions[0], None
    if revision != wanted:
        note = f"{address}: revision {wanted[:7]} of {place.repository} is not available; {revision} is used instead"
    try:
        config = download("config.json", revision)
    except Exception:  # optional: it does not exist, or the network has failed since
        return HubFile(weights, None, note)
    return HubFile(weights, HubConfig.read(config, address), note)


class _Download:
    """Downloader for one repository, which uses only the cache once the hub cannot be reached."""

    def __init__(self, repository: str):
        self._repository = repository
        self._cache_only = False

    def __call__(self, name: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        before = try_to_load_from_cache(self._repository, name, revision=revision)
        try:
            with _without_retry_warnings():
                path = hf_hub_download(self._repository, name, revision=revision, local_files_only=self._cache_only)
        except Exception as error:
            self._cache_only = self._cache_only or hub_errors.is_no_network(error)
            raise
        is_new = not isinstance(before, str) or os.path.realpath(before) != os.path.realpath(path)
        blob = _blob(Path(path))
        if is_new and blob is not None and not _is_whole(blob):
            for broken in (Path(path), blob):
                broken.unlink(missing_ok=True)
            raise WeightsError(
                f"cannot fetch {name} of {self._repository}: the download is damaged (its SHA-256 differs from the "
                "hub's) and has been deleted; try again"
            )
        return Path(path)


@contextlib.contextmanager
def _without_retry_warnings() -> Iterator[None]:
    """Silence huggingface_hub's warnings, ten of them if there is no network: the error that follows says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_there(place: HubPlace, download: _Download) -> tuple[Path, str]:
    """Return the first file that exists, and its revision."""
    first_error = None
    for revision, name in itertools.product(place.revisions, place.files):
        try:
            return download(name, revision), revision
        except WeightsError:
            raise
        except Exception as error:
            if not hub_errors.is_absence(error):
                raise
            first_error = first_error or error
    assert first_error is not None
    raise first_error


@contextlib.contextmanager
def explaining_damage(path: Path) -> Iterator[None]:
    """Extend a WeightsError raised inside the block with advice if the cached file at `path` is damaged."""
    try:
        yield
    except WeightsError as error:
        blob = _blob(path)
        if blob is None or _is_whole(blob):
            raise
        raise WeightsError(f"{error}; the cached copy is damaged: remove {blob} to download it again") from error


def _blob(path: Path) -> Path | None:
    """Return the cache file that the link `path` points to if it is named by its SHA-256, as all large files are."""
    try:
        blob = Path(os.path.normpath(path.parent / path.readlink()))
    except OSError:  # not a link: the cache's file system has none
        return None
    return blob if _SHA256.fullmatch(blob.name) else None


def _is_whole(blob: Path) -> bool:
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.name


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Preprocessing and class names in timm's `config.json`; None where absent."""

    preprocessing: dict[str, Any] | None
    class_names: tuple[str, ...] | None

    @classmethod
    def read(cls, path: Path, address: str) -> "HubConfig":
        """Read a `config.json`.

        Raises:
          WeightsError: the file is not a JSON object of the expected kind.
        """
        with refusing_damage(f"{address} has a damaged config.json"):
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError("absurdly long")
            config = json.loads(path.read_text("utf-8"))
            fields = {}
            described = config.get("pretrained_cfg", {})
            if "input_size" in described:
                fields["image_size"] = int(described["input_size"][-1])
            for ours, theirs in (("crop_fraction", "crop_pct"), ("mean", "mean"), ("std", "std")):
                if theirs in described:
                    fields[ours] = described[theirs]
            if fields:
                preprocessing_from_file(fields)
            names = config.get("label_names", described.get("label_names"))
            return cls(fields or None, None if names is None else tuple(map(str, names)))

    def apply(self, info: WeightsInfo) -> WeightsInfo:
        """Return `info` with the configuration's preprocessing and class names."""
        if self.preprocessing:
            preprocessing = Preprocessing.from_dict(info.preprocessing.to_dict() | self.preprocessing)
            info = dataclasses.replace(info, preprocessing=preprocessing)
        if self.class_names is not None and len(self.class_names) == info.num_classes:
            info = dataclasses.replace(info, class_names=self.class_names)
        return info
