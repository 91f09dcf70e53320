"""Claim: the classes of a published net have ImageNet's names."""

import zipfile

import pytest

from repvgg_jax.weights.imagenet_classes import imagenet_class_names
from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from tests.helpers.repository import ROOT, shared_data

TOLD_APART = {134: "crane (bird)", 517: "crane (machine)", 639: "tank suit"}
"""Classes whose first word also names another class."""


def test_names_are_the_first_words_of_their_wordnet_synsets():
    info = pytest.importorskip("timm.data").ImageNetInfo()
    lemmas = [info.label_name_to_description(synset, detailed=False) for synset in info.label_names()]
    expected = [TOLD_APART.get(index, lemma.split(", ")[0]) for index, lemma in enumerate(lemmas)]
    assert list(imagenet_class_names()) == expected
    assert len(set(expected)) == 1000


def test_photographs_are_named_after_these_classes():
    """The file name of each of the 200 is SYNSET_NAME.JPEG."""
    lines = (ROOT / "repvgg_jax" / "weights" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    filed = {line.replace(" ", "_").lower() for line in lines}
    with zipfile.ZipFile(shared_data("photos.zip")) as archive:
        photographs = [name.rpartition("/")[2].removesuffix(".JPEG") for name in archive.namelist()]
    assert len(photographs) == 200
    assert {name.lower() for name in photographs} <= filed
