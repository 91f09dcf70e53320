"""Network architectures named on a command line: a published variant, a JSON file, or a weight file."""

import dataclasses
import json
import os

from ..errors import ConfigError, shown
from ..net.variants import Variant, get_variant, list_models
from ..paths import in_bucket, option_place
from .header import variant_from_json
from .loading import inspect_weights

MAX_BLOCKS = 9999
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


def expected_variant(option: str, text: str | None) -> str | Variant | None:
    """Return the expected variant for `load_weights`: a published variant's name, or the variant a file describes.

    Raises:
      RepVGGError: as from `find_variant`.
    """
    return text if text is None or not _is_file(text) else find_variant(option, text)


def find_variant(option: str, text: str) -> Variant:
    """Return the variant called `text`, or the one that the file `text` describes.

    A `.json` file holds a variant's fields, such as `{"num_blocks": [1, 2, 4, 1], "widths": [16, 16, 32, 64, 128]}`, or
    the header of a native weight file. A variant without a name is named after the file.

    Args:
      option: name of the option, for error messages.
      text: a name of `list_models()`, a `.json` file, or anything that `inspect_weights` reads.

    Raises:
      UnknownModelError: it is neither a variant's name nor a file.
      ConfigError: the JSON file cannot be read or does not describe a network.
      WeightsError: as from `inspect_weights`.
    """
    if not _is_file(text):
        return get_variant(text)
    path = option_place(option, text)
    if path.suffix != ".json":
        return inspect_weights(path).variant
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        header = header if "variant" in header else {"variant": header}
        fields = header["variant"]
        if isinstance(fields, dict) and sum(fields["num_blocks"]) > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} blocks")
        variant = variant_from_json(header, f"{option} {text}", MAX_BLOCKS, None)
        is_named = isinstance(fields, str) or "name" in fields
        return variant if is_named else dataclasses.replace(variant, name=path.stem)
    except OSError as error:
        raise ConfigError(f"{option} {text}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"there is no field {error}" if isinstance(error, KeyError) else f"{error}"
        raise ConfigError(f"{option} {text} does not describe a network: {shown(reason)}") from error


def _is_file(text: str) -> bool:
    if text in list_models():
        return False
    return text.endswith((".json", *_WEIGHT_FILES)) or in_bucket(text) or os.path.exists(text)  # noqa: PTH110
