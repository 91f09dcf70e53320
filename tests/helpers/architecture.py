"""Small nets for commands, as files that `--model` and `-a` accept."""

import json
from pathlib import Path

from repvgg_jax.net.variants import Variant
from repvgg_jax.weights.header import variant_to_json


def write_variant(folder: Path, variant: Variant) -> Path:
    """Write `folder/NAME.json` with the variant's fields."""
    path = folder / f"{variant.name}.json"
    path.write_text(json.dumps(variant_to_json(variant)), encoding="utf-8")
    return path
