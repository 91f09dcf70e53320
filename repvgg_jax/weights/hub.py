"""Weights on the Hugging Face hub: `hf://OWNER/REPOSITORY[@REVISION][/FILE]`.

Download, cache (`HF_HOME`, `HF_HUB_CACHE`) and offline mode (`HF_HUB_OFFLINE=1`) are huggingface_hub's own.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..errors import WeightsError, reason_of, shown
from ..extras import install_hint
from ..paths import option_place
from ..preprocess import Preprocessing
from .header import refusing_damage
from .info import WeightsInfo, preprocessing_from_file

SCHEME = "hf://"
FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's repositories hold, the first preferred."""

MAX_CONFIG_BYTES = 16 << 20

_ADDRESS = re.compile(r"(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")


def is_hub_address(path: object) -> bool:
    """Whether `path` names something on the hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def weights_path(option: str, text: str) -> str:
    """Return the place of a weight file: a hub address or a bucket's as it is, a path with `~` expanded.

    Args:
      option: what it is given by, for the message.
      text: what was given.

    Raises:
      ConfigError: as `option_place`.
    """
    return text if is_hub_address(text) else str(option_place(option, text))


def fetch(address: str) -> tuple[Path, "HubConfig | None"]:
    """Return the local copy of a hub file, downloaded unless the cache has it, and what its repository says of it.

    Raises:
      WeightsError: huggingface_hub is not installed, no such file, or neither network nor cached copy.
    """
    parts = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if parts is None:
        raise WeightsError(f"{shown(address)} is no hub address; expected hf://OWNER/REPOSITORY[@REVISION][/FILE]")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(f"{address} needs huggingface_hub: {install_hint('hub')}") from error

    no_network = False

    def download(name: str) -> Path:
        repository, revision = parts["repository"], parts["revision"]
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=no_network))

    names = (parts["file"],) if parts["file"] else FILES
    first_error: Exception | None = None
    for name in names:
        try:
            weights = download(name)
            break
        except EntryNotFoundError as error:  # also: neither network nor a cached copy
            first_error = first_error or error
            no_network = isinstance(error, LocalEntryNotFoundError)  # do not wait for it a second time
        except Exception as error:  # whichever HTTP library the hub's uses has errors of its own
            raise WeightsError(f"cannot fetch {address}: {shown(reason_of(error))}") from error
    else:
        assert first_error is not None
        raise WeightsError(
            f"cannot fetch {address} ({' or '.join(names)}): {shown(reason_of(first_error))}"
        ) from first_error
    try:
        config = download("config.json")
    except Exception:  # there is none, or no network any more; the weights do without
        return weights, None
    return weights, HubConfig.read(config, address)


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """What timm's `config.json` says beyond the weights: preprocessing (None if absent) and class names."""

    preprocessing: dict[str, Any] | None
    class_names: tuple[str, ...] | None

    @classmethod
    def read(cls, path: Path, address: str) -> "HubConfig":
        """Raise WeightsError if the file is no JSON object of the expected kind."""
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
        """Return `info` with what the config adds to it."""
        if self.preprocessing:
            preprocessing = Preprocessing.from_dict(info.preprocessing.to_dict() | self.preprocessing)
            info = dataclasses.replace(info, preprocessing=preprocessing)
        if self.class_names is not None and len(self.class_names) == info.num_classes:
            info = dataclasses.replace(info, class_names=self.class_names)
        return info
