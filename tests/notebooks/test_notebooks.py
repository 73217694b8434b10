"""Every notebook runs from its first cell to its last."""

import pathlib

import jupytext
import nbclient
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.py")), ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures
