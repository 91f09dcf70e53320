"""What a command's weights argument names."""

import os

from ..errors import ConfigError, UnknownModelError, WeightsError
from ..net.variants import VARIANTS, get_variant
from ..paths import expand_home, in_bucket, is_url, option_place
from .hub import SCHEME, is_hub_address
from .pretrained import find_pretrained


def weights_path(option: str, text: str) -> str:
    """Return where the weights are that a command is given.

    A file or folder of that name comes first; then a published variant's name stands for its ImageNet weights on the
    Hugging Face hub. Addresses of the hub and of buckets stay as they are, and `~` in a path is expanded.

    Args:
      option: what it is given by, for the message.
      text: what was given.

    Returns:
      What `load_weights` and `inspect_weights` read.

    Raises:
      WeightsError: neither a file nor a variant's name, though it looks like one, or a variant without weights on the
        hub.
      ConfigError: any other URL, or as `option_place`.
    """
    if is_hub_address(text):
        return text
    if is_url(text) and not in_bucket(text):
        raise ConfigError(
            f"{option} {text}: only folders and files of this machine, of a bucket or of the hub can be used, and it "
            "is not fetched: download it first, and give the file"
        )
    if not is_url(text) and not _exists(text):
        name = _variant_name(text)
        if name is not None:
            return f"{SCHEME}{find_pretrained(name).variant}"
    return str(option_place(option, text))


def _variant_name(text: str) -> str | None:
    """Return the published variant that `text` names, None if it is a path."""
    try:
        return get_variant(text).name
    except UnknownModelError as error:
        has_suffix = os.path.splitext(text)[1] != ""  # noqa: PTH122 (any text at all)
        if has_suffix or os.sep in text or not text.lower().startswith("repvgg"):
            return None
        raise WeightsError(f"there is no file {text}, and no such variant; known: {', '.join(VARIANTS)}") from error


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(expand_home(text))
    except ValueError:  # a NUL in it
        return False
