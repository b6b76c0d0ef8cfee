"""The notebooks run from top to bottom."""

import importlib.util
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


SOURCES = {
    "git+https://host/owner/jaxattn": "jaxattn[train] @ git+https://host/owner/jaxattn",
    "jaxattn==0.1.0": "jaxattn[train]==0.1.0",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_alone_installs_what_it_is_told_to_and_nothing_by_name(path, tmp_path, monkeypatch):
    first = next(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    assert first.startswith("# Where jaxattn is installed from")
    code = first.replace('%pip install -q "{wanted}"', "installed.append(wanted)")
    assert code != first

    def install(source: str) -> list[str]:
        scope = {"installed": []}
        exec(code.replace('SOURCE = ""', f"SOURCE = {source!r}"), scope)
        return scope["installed"]

    monkeypatch.chdir(path.parent)
    assert install("") == []  # it is there already
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert install("") == [f"{path.parent.parent}[train]"]  # the clone in which it lies
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    for source, wanted in SOURCES.items():
        assert install(source) == [wanted]
    pathlib.Path("jaxattn-0.1.0-py3-none-any.whl").touch()
    assert install("jaxattn-0.1.0-py3-none-any.whl") == [f"{tmp_path}/alone/jaxattn-0.1.0-py3-none-any.whl[train]"]
    for refused in ("", "jaxattn", "jaxattn[train]", "other.whl"):
        with pytest.raises(ValueError, match=r"^SOURCE \(="):
            install(refused)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5
