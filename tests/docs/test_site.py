"""Claim: the documentation builds without a warning, its links work, and so does everything else, search included, when
its pages are opened as files on a machine without a network.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; `--strict` makes every broken link, anchor and cross reference an error."""
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(markup: str) -> str:
    """Return the text of a piece of HTML, with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def reference_entries(site: Path) -> dict[str, str]:
    """Return the markup of each object on the API page, by name."""
    page = (site / "api.html").read_text(encoding="utf-8")
    parts = re.split(r'(?=<h\d id="(?:repvgg_jax\.))', page)[1:]
    return {part.split('"', 2)[1].removeprefix("repvgg_jax."): part for part in parts}


def test_every_public_name_is_in_the_reference(site):
    import repvgg_jax as rv

    entries = reference_entries(site)
    for name in set(rv.__all__) - {"__version__"}:
        assert name in entries, name
        public = getattr(rv, name)
        summary = text_of(public.__doc__.strip().split("\n")[0]).replace("`", "")
        assert summary in text_of(entries[name]), name


def test_functions_and_dataclasses_show_their_signatures(site):
    entries = reference_entries(site)
    expected = {
        "create_model": "create_model( variant: str | Variant, num_classes: int = 1000, deploy: bool = False, *,",
        "to_deploy": "to_deploy( model: RepVGG, variables: Tree ) -> tuple[RepVGG, dict[str, Any]]",
        "Branches": "Branches( dense_copies: int = 1, dbb_1x1_3x3: bool = False, dbb_1x1_avg: bool = False, point:",
        "inference.predictor.Predictor.__call__": "__call__(images: Any) -> ndarray",
    }
    for name, signature in expected.items():
        assert signature in text_of(entries[name]), name
    import repvgg_jax as rv

    for name in set(rv.__all__) - {"__version__"}:
        public = getattr(rv, name)
        if not isinstance(public, type):
            assert f"{name}(" in text_of(entries[name]), name


def test_long_signatures_have_a_line_for_each_argument(site):
    """The formatter is installed (ruff, in the extra `docs`): without one, each signature is one long line."""
    lines = html.unescape(re.sub(r"<[^>]+>", "", reference_entries(site)["create_model"])).splitlines()
    assert "    num_classes: int = 1000," in lines


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("changelog.html", "CHANGELOG.md"),
        ("contributing.html", "CONTRIBUTING.md"),
        ("license.html", "LICENSE"),
        ("citation.html", "CITATION.cff"),
        ("finetuning.html", "examples/finetune/README.md"),
    ],
)
def test_pages_made_from_repository_files_contain_their_text(site, page, source):
    shown = re.sub(r"\W+", " ", text_of((site / page).read_text(encoding="utf-8")))
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines()
    prose = [line for line in lines if re.fullmatch(r"[\w ,.;:()'\"-]{30,}", line)]
    assert prose
    for line in prose:
        assert re.sub(r"\W+", " ", line).strip() in shown, line


def test_the_fine_tuning_page_has_headings(site):
    headings = re.findall(r"<h2 id=[^>]*>(.*?)<a", (site / "finetuning.html").read_text(encoding="utf-8"))
    assert [text_of(h) for h in headings] == ["1. Split", "2. Fine-tune", "3. Evaluate", "4. Export"]


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"""<(?:script|img|iframe|link(?=[^>]*stylesheet))[^>]*(?:src|href)=["']?(https?:)?//""")
    for page in site.rglob("*.html"):
        assert not fetched.search(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_search_index_is_a_script_that_every_page_can_load_from_a_file(site):
    """A page opened as a file may run scripts next to it, but may neither fetch nor start a worker."""
    script = (site / "search/search_index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var __index = "))
    indexed = {entry["location"].split("#")[0] for entry in index["docs"]}
    pages = {page.name for page in site.glob("*.html")} - {"404.html"}
    assert indexed == pages
    for name in pages:
        scripts = re.findall(r'<script src="([^"]+)"', (site / name).read_text(encoding="utf-8"))
        assert "iframe-worker.js" in scripts, name
        assert all((site / address).is_file() for address in scripts), name


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("words", "address"), [("equivalent_kernel_bias", "api.html"), ("preemption", "training.html")]
)
def test_search_works_on_a_page_opened_as_a_file(site, tmp_path, words, address):
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"{(site / 'index.html').as_uri()}?q={words}"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', page)
    assert any(f"/{address}" in result for result in results), results
