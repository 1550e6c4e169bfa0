"""The notebooks run as they are, only smaller."""

import pytest

from tests.support.other_backend import environment_without_tensorflow
from tests.support.paths import ROOT
from tests.support.running import BACKEND

NOTEBOOKS = ROOT / "notebooks"
SMALL = {
    "mtp_speculative_decoding": {
        "BACKBONE_STEPS": "2",
        "MODULE_STEPS": "2",
        "NEW_TOKENS": "6",
        "FILES": "6",
        "DRAFTS": "2",
        "LAYERS": "1",
    },
    "think_loop": {
        "SEEDS": "1",
        "STEPS": "2",
        "BATCH": "4",
        "MOST": "2",
        "LEFT_OUT": "8 layers; 1/1/1, k = 4; 1/1/1, k = 6; adaptive, price 0.05",
    },
    "layer_routing": {
        "SEEDS": "1",
        "STEPS": "3",
        "BATCH": "4",
        "WORDS": "18",
        "SIMULATIONS": "1",
        "LAYERS": "3",
        "TRAINED": "1",
        "THINKING": "1",
        "LEFT_OUT": "4 experts at random",
    },
    "qwen3_to_hybrid": {
        "TEACHER_STEPS": "2",
        "ALIGN_STEPS": "1",
        "STEPS": "1",
        "BATCH": "2",
        "HELD_OUT": "4",
        "FILES": "6",
        "LAYERS": "4",
        "STUDENTS": "1",
    },
    "many_devices": {
        "EPOCHS": "2",
        "LAYERS": "1",
    },
}


@pytest.fixture(autouse=True)
def _without_tensorflow(tmp_path, monkeypatch):
    for key, value in environment_without_tensorflow(tmp_path).items():
        monkeypatch.setenv(key, value)


def printed_by(name, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    for key, value in {**SMALL[name], "KERAS_BACKEND": BACKEND}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )


@pytest.mark.skipif(BACKEND != "jax", reason="a long way, once is enough")
def test_drafts_change_no_token(monkeypatch):
    assert printed_by("mtp_speculative_decoding", monkeypatch).count("the same tokens") == 2


@pytest.mark.skipif(BACKEND != "jax", reason="a long way, once is enough")
def test_models_of_every_kind_learn_in_the_think_loop(monkeypatch):
    printed = printed_by("think_loop", monkeypatch)
    assert "the same logits, bit for bit: True" in printed
    assert printed.count("seed 0") == 4


@pytest.mark.skipif(BACKEND != "jax", reason="a long way, once is enough")
def test_routes_are_searched_and_learned_and_experts_compared(monkeypatch):
    printed = printed_by("layer_routing", monkeypatch)
    assert "the same logits, bit for bit: True" in printed
    assert "right on the full path" in printed and "one LoRA" in printed


@pytest.mark.skipif(BACKEND != "jax", reason="a long way, once is enough")
def test_every_way_of_conversion_is_distilled(monkeypatch):
    printed = printed_by("qwen3_to_hybrid", monkeypatch)
    assert "from attention distance" in printed and "gap closed" in printed
    assert printed.count("random") == 1 and printed.count("25 % chosen") == 2
    assert "can be recalled" in printed


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution splits on JAX alone")
def test_eight_devices_train_write_and_save_as_one(monkeypatch):
    printed = printed_by("many_devices", monkeypatch)
    assert "equal losses: True" in printed and "the same tokens: True" in printed
    assert "bit for bit: True" in printed and "the same parts on the same mesh: True" in printed
    assert "data=8,expert=8 with FSDP, 64 x 4096" in printed
