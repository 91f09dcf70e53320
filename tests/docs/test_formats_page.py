"""Claim: docs/formats.md names every field of the files, and CITATION.cff is that of this release."""

import dataclasses
import re

import yaml

import repvgg_jax as rv
from repvgg_jax.weights import header
from tests.helpers.repository import ROOT
from train.recipe import Recipe
from train.state import TrainState

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def names(text: str) -> set[str]:
    """Return everything in backquotes."""
    return set(re.findall(r"`([^`]+)`", text))


def after(heading: str) -> str:
    """Return a section's text."""
    return PAGE.split(f"### {heading}\n")[1].split("\n#")[0]


def test_the_headers_fields_match_native_files():
    cells = re.findall(r"^\| (`[^|]+) \| ", after("Native weight files"), re.M)
    assert names(" ".join(cells)) - {"repvgg_jax"} == header.FIELDS
    assert f"of the format: {header.FORMAT_VERSION}." in PAGE
    assert f"`version` in the header, now {header.FORMAT_VERSION};" in PAGE


def test_forms_and_preprocessing_are_named():
    fields = {field.name for field in dataclasses.fields(rv.Preprocessing)}
    assert names(after("Native weight files")) >= fields | set(header.IS_DEPLOY)


def test_a_runs_groups_and_state_fields_are_named():
    groups = [field.name for field in dataclasses.fields(Recipe)]
    shown = ", ".join(f"`{name}`" for name in groups[:-1]) + f" and `{groups[-1]}`"
    assert f"has the groups {shown};" in " ".join(PAGE.split())
    assert names(after("Files of a run")) >= {field.name for field in dataclasses.fields(TrainState)}


def test_the_citation_is_of_this_release_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == rv.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "required by the schema"
    (paper,) = citation["references"]
    bibtex = (ROOT / "docs" / "citation.md").read_text(encoding="utf-8")
    assert paper["doi"] in bibtex
    assert f"{paper['start']}--{paper['end']}" in bibtex
    assert all(f"{author['family-names']}, {author['given-names']}" in bibtex for author in paper["authors"])
