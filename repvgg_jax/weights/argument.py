"""Resolution of a command's weights argument to a path or an address."""

import os

from ..errors import ConfigError, UnknownModelError, WeightsError
from ..net.variants import VARIANTS, get_variant
from ..paths import expand_home, in_bucket, is_url, option_place
from .hub import SCHEME, is_hub_address
from .pretrained import find_pretrained


def weights_path(option: str, text: str) -> str:
    """Return the path or address of the weights named on a command line.

    An existing file or folder takes precedence; otherwise a published variant's name stands for its ImageNet weights
    on the Hugging Face hub. Hub and bucket addresses are returned unchanged, and `~` in a path is expanded.

    Args:
      option: name of the option, for error messages.
      text: the option's value.

    Returns:
      A path or address that `load_weights` and `inspect_weights` accept.

    Raises:
      WeightsError: `text` looks like a variant's name but is neither a variant nor a file, or the variant has no
        weights on the hub.
      ConfigError: any other URL, or as `option_place`.
    """
    if is_hub_address(text):
        return text
    if is_url(text) and not in_bucket(text):
        raise ConfigError(
            f"{option} {text}: only local files and folders, buckets (gs://, s3://) and the hub (hf://) can be used, "
            "and a URL is not fetched: download the file first"
        )
    if not is_url(text) and not _exists(text):
        name = _variant_name(text)
        if name is not None:
            return f"{SCHEME}{find_pretrained(name).variant}"
    return str(option_place(option, text))


def _variant_name(text: str) -> str | None:
    """Return the name of the published variant that `text` names; None if `text` is a path."""
    try:
        return get_variant(text).name
    except UnknownModelError as error:
        has_suffix = os.path.splitext(text)[1] != ""  # noqa: PTH122 (may be arbitrary text)
        if has_suffix or os.sep in text or not text.lower().startswith("repvgg"):
            return None
        raise WeightsError(
            f"there is no file {text} and no variant of that name; the variants are {', '.join(VARIANTS)}"
        ) from error


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(expand_home(text))
    except ValueError:  # a NUL in it
        return False
