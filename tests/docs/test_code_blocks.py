"""Claim: every code block of README, docs and examples does what the page says.

Python blocks run in the order of their page and share its names; commands are parsed by their real parsers and run, on
real photographs. Small nets replace the published ones of the same name, and training is left to `test_examples.py`; in
the slow tests the published nets train. A block that cannot run here says why, in a comment on the page.
"""

import subprocess

import pytest

from tests.helpers.pages import (
    PAGES,
    PARSERS,
    ROOT,
    Sandbox,
    blocks,
    check_tool,
    command_lines,
    module_call,
    run_page,
)

LANGUAGES = ("python", "sh")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page):
        assert block.language in LANGUAGES or block.reason, (
            f"{block.place}: a {block.language or 'nameless'} block is not run; "
            "say why in a comment before it: <!-- not run: REASON -->"
        )


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_accepted_by_its_parser(page):
    for block in (b for b in blocks(page) if b.language == "sh"):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        for module, arguments in filter(None, map(module_call, command_lines(block.code))):
            if module == "venv":
                continue
            if module == "pip":
                check_tool([module, *arguments], block.place)
                continue
            assert module in PARSERS, f"{block.place}: no command python -m {module}"
            try:
                PARSERS[module](arguments)
            except SystemExit:
                pytest.fail(f"{block.place}: not understood: python -m {module} {' '.join(arguments)}")


TESTED_ELSEWHERE = ("examples/finetune/README.md",)  # test_examples.py
PAGES_THAT_RUN = [
    page for page in PAGES if page not in TESTED_ELSEWHERE and any(b.reason is None for b in blocks(page))
]


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_blocks_of_a_page_run_in_order(page, sandbox):
    run_page(page, sandbox)


@pytest.mark.slow
@pytest.mark.usefixtures("offline_hub")
@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_a_page_runs_with_its_training_and_the_published_nets(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, Sandbox(tmp_path, trains=True))


def test_the_pages_exist():
    assert "README.md" in PAGES
    assert "docs/training.md" in PAGES
    assert all((ROOT / page).is_file() for page in PAGES)
