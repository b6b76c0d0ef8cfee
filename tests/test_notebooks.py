"""The notebooks run from top to bottom."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need `pip install nbclient ipykernel`")
nbclient = pytest.importorskip("nbclient", reason="notebooks need `pip install nbclient ipykernel`")
pytest.importorskip("ipykernel", reason="notebooks need `pip install nbclient ipykernel`")

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_ends_with_a_picture(path):
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute()  # raises at the first cell that fails
    last = notebook.cells[-1]
    assert any("image/png" in output.get("data", {}) for output in last.outputs)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert "Warning" not in output.get("text", ""), output["text"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5
