"""Claim: the notebook runs from top to bottom, and is stored without outputs."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.repository import ROOT

PATH = ROOT / "examples" / "repvgg_tour.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout's library, not an installed one
    notebook = nbformat.read(PATH, as_version=4)
    done = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
