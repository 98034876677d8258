"""The notebook runs from its first cell to its last, and its changed equation changes the images."""

import json

import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "examples" / "moma.ipynb"
LIMIT = 300  # seconds of a cell


def test_notebook_is_kept_without_outputs() -> None:
    """They would differ with every run."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) > 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_notebook_runs() -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    book = nbformat.read(NOTEBOOK, 4)
    client.NotebookClient(book, timeout=LIMIT, resources={"metadata": {"path": str(ROOT)}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    images = [
        output.data["image/png"]
        for cell in code
        for output in cell.outputs
        if output.output_type == "execute_result" and "image/png" in output.data
    ]
    assert len(images) == 6 and len(set(images)) == 6
    assert "metadata.jsonl" not in str(code[-1].outputs) and "export" in str(code[-1].outputs)
