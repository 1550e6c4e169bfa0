"""The notebooks run as they are, only smaller."""

import pytest

from tests.support.paths import ROOT
from tests.support.running import BACKEND

NOTEBOOKS = ROOT / "notebooks"
SMALL = {"BACKBONE_STEPS": "2", "MODULE_STEPS": "2", "NEW_TOKENS": "6", "FILES": "6"}


@pytest.mark.skipif(BACKEND != "jax", reason="a long way, once is enough")
@pytest.mark.parametrize("name", ["mtp_speculative_decoding"])
def test_a_notebook_runs(name, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    for key, value in SMALL.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert printed.count("the same tokens") == 4
