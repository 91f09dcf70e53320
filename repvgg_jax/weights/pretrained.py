"""Table of the published ImageNet weights on the Hugging Face hub: timm's copies of the authors' files.

Sources: repositories, files and licence from timm's table of weights (`timm/models/byobnet.py`, 1.0) and the pages of
its repositories; revisions and sizes from those pages (sizes of A1, B1 and B2g4: computed); top-1 from timm's
`results/results-imagenet.csv` (224 pixels, crop 0.875). `None` means that none of these sources states it.
"""

import dataclasses

from ..errors import WeightsError
from ..net.variants import get_variant

AUTHORS_PAGE = "https://github.com/DingXiaoH/RepVGG"
"""Page with links to the authors' files on Google Drive and Baidu Cloud."""

MAIN = "main"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A variant's ImageNet weights on the hub, in training form, for 1000 classes.

    Attributes:
      variant: the variant's name.
      architecture: timm's name of the variant.
      revision: commit to download; `main` where no page shows a full commit hash.
      megabytes: file size, in 10^6 bytes.
      top1: accuracy measured by timm, in %.
      licence: licence of the weights, as the hub spells it.
      file: file name in the repository.
    """

    variant: str
    architecture: str
    revision: str
    megabytes: float
    top1: float | None
    licence: str = "mit"
    file: str = "model.safetensors"

    @property
    def repository(self) -> str:
        """Owner and name of the repository."""
        return f"timm/{self.architecture}.rvgg_in1k"

    @property
    def revisions(self) -> tuple[str, ...]:
        """Revisions to try, the preferred one first."""
        return tuple(dict.fromkeys((self.revision, MAIN)))


_TABLE = (
    Pretrained("RepVGG-A0", "repvgg_a0", MAIN, 36.6, None),
    Pretrained("RepVGG-A1", "repvgg_a1", MAIN, 56.5, None),
    Pretrained("RepVGG-A2", "repvgg_a2", "dc6dcc716225b77ce5cb6b1716215b4e60db0eb4", 113, 76.458),
    Pretrained("RepVGG-B0", "repvgg_b0", MAIN, 63.5, 75.142),
    Pretrained("RepVGG-B1", "repvgg_b1", MAIN, 230, 78.368),
    Pretrained("RepVGG-B1g4", "repvgg_b1g4", "580b2d8cc746b2e91682a9205bd1cce18882ea09", 160, 77.582),
    Pretrained("RepVGG-B2", "repvgg_b2", "a7de07dfad8e1cee6cb4bae5efbdf0a564625104", 356, 78.792),
    Pretrained("RepVGG-B2g4", "repvgg_b2g4", MAIN, 247, 79.382),
    Pretrained("RepVGG-B3", "repvgg_b3", "65bb8169867adf73b22471ecdbe2c9c84c03e2f0", 493, 80.506),
    Pretrained("RepVGG-B3g4", "repvgg_b3g4", "ea41bad3e233fc9079c2ca3c73583ba857b4480b", 336, 80.216),
    Pretrained("RepVGG-D2se", "repvgg_d2se", "1172081568310c59a4c19a2dda89fdc8a18ac4ce", 534, None),
)
PRETRAINED: dict[str, Pretrained] = {row.variant: row for row in _TABLE}


def find_pretrained(name: str) -> Pretrained:
    """Return the table row of a published variant's ImageNet weights on the hub.

    Args:
      name: one of `list_models()`; letter case does not matter.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the hub has no weights of the variant.
    """
    name = get_variant(name).name
    if name not in PRETRAINED:
        raise WeightsError(
            f"timm has no weights of {name} on the Hugging Face hub; the authors' files are linked from "
            f"{AUTHORS_PAGE}: download one, and give its path instead"
        )
    return PRETRAINED[name]
