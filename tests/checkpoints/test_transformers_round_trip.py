"""Models through transformers and back; skipped where transformers and torch are not installed."""

import json

import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextClassifier
from tests.support.published import FIXTURES, MODELS, SMALLEST, published, save, weights
from tests.support.small_models import logits_once

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


def read_back(model_class, folder):
    """A model as transformers reads it, which must leave no tensor over and lack none."""
    model, report = model_class.from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        # The default one refuses experts as narrow as these.
        experts_implementation="eager",
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_export_is_the_model_that_was_imported(name, tmp_path):
    fixture = np.load(FIXTURES / f"{name}.npz")
    case = next(c for c in ("length_40", "length_64", "length_65") if f"case/{c}/logits" in fixture)
    model = Qwen3Next.from_preset(save(tmp_path / "in", *published(name)), progress=False)
    model.export_to_transformers(tmp_path / "out", max_shard_size="50KB")
    ids = torch.from_numpy(fixture[f"case/{case}/input_ids"].astype("int64"))
    read, written = (
        read_back(transformers.AutoModelForCausalLM, tmp_path / folder) for folder in ("in", "out")
    )
    with torch.no_grad():
        assert torch.equal(written(ids).logits, read(ids).logits)

    written.save_pretrained(tmp_path / "again")
    again = Qwen3Next.from_preset(tmp_path / "again", progress=False)
    assert again.config == model.config
    for path, array in weights(again).items():
        np.testing.assert_array_equal(array, weights(model)[path])


def test_exported_classifier_is_one_there(tmp_path):
    folder = save(tmp_path / "in", *published(SMALLEST))
    model = Qwen3NextClassifier.from_preset(folder, num_labels=3, progress=False)
    model.export_to_transformers(tmp_path / "out")
    theirs = read_back(transformers.AutoModelForSequenceClassification, tmp_path / "out")
    ids = np.arange(7)[None]
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits_once(model, ids), logits, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"].keys() == set(
        "012"
    )
