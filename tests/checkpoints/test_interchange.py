"""Published checkpoints in and out, against tensors that transformers wrote."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen3_next.checkpoints import interchange
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.checkpoints.safetensors_files import INDEX, SINGLE, Checkpoint
from qwen3_next.models.weight_table import weight_table
from tests.support.float64_model import next_logits
from tests.support.published import (
    FIXTURES,
    MODELS,
    SMALLEST,
    assert_refused,
    assert_same_weights,
    load,
    published,
    save,
    weights,
)
from tests.support.running import CHEAPEST, run, weight_arrays, with_weights


@pytest.mark.parametrize("name", MODELS)
def test_published_checkpoint_gives_published_logits(name, tmp_path):
    """By way of float64: both float32 sides round, and which way depends on the machine."""
    fixture = np.load(FIXTURES / f"{name}.npz")
    case = next(c for c in ("length_40", "length_64", "length_65") if f"case/{c}/logits" in fixture)
    model = load(save(tmp_path, *published(name)))
    ids, positions = (fixture[f"case/{case}/{key}"] for key in ("input_ids", "positions"))
    exact = next_logits(weights(model), model.config, ids)
    theirs = fixture[f"case/{case}/logits"]
    np.testing.assert_allclose(theirs, exact[:, positions], atol=1e-4, rtol=0)
    ours = run(with_weights(model), *weight_arrays(model), ids, mode=CHEAPEST)
    np.testing.assert_allclose(ours, exact, atol=1e-4, rtol=0)
    exact[0, 3] *= 1.01
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_export_has_exactly_the_published_tensors(name, tmp_path):
    config, tensors = published(name)
    model = load(save(tmp_path / "in", config, tensors))
    model.export_to_transformers(tmp_path / "out")
    exported = load_file(tmp_path / "out" / SINGLE)
    assert_same_weights(exported, tensors)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    fields["num_local_experts"] = fields.get("num_experts")
    for key in set(config) & set(fields):
        assert fields[key] == config[key], key
    assert config_from_hugging_face(fields) == config_from_hugging_face(config)


def test_shards_load_as_one_file_does(tmp_path, checkpoint_weights):
    folder = save(tmp_path, *published(SMALLEST), max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert_same_weights(weights(load(folder)), checkpoint_weights)


def test_fused_experts_load_as_separate_ones_do(tmp_path, checkpoint_weights):
    config, tensors = published(SMALLEST)
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{base}.{e}.{name}_proj.weight") for name in ("gate", "up", "down")]
            for e in range(config["num_experts"])
        ]
        tensors[f"{base}.gate_up_proj"] = np.stack([np.concatenate(e[:2]) for e in each])
        tensors[f"{base}.down_proj"] = np.stack([e[2] for e in each])
    assert_same_weights(weights(load(save(tmp_path, config, tensors))), checkpoint_weights)


def test_bfloat16_tensors_are_not_widened(tmp_path, monkeypatch, checkpoint_weights):
    config, tensors = published(SMALLEST)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    folder = save(tmp_path, config, tensors)
    wide = []
    original = interchange.Tensors.__getitem__
    monkeypatch.setattr(
        interchange.Tensors,
        "__getitem__",
        lambda self, i: wide.append(original(self, i).dtype) or original(self, i),
    )
    loaded = weights(load(folder, dtype="bfloat16"))
    for path, array in loaded.items():
        expected = checkpoint_weights[path].astype(ml_dtypes.bfloat16).astype("float32")
        np.testing.assert_array_equal(array.astype("float32"), expected)
    assert wide.count(np.float32) == sum(array.dtype == np.float32 for array in loaded.values())


def test_tensors_are_read_just_before_their_variable_is_assigned(checkpoint, monkeypatch):
    read, assign, events = Checkpoint.read, keras.Variable.assign, []

    def logged_read(self, name):
        events.append(name)
        return read(self, name)

    def logged_assign(self, value):
        events.append(self.path)
        return assign(self, value)

    monkeypatch.setattr(Checkpoint, "read", logged_read)
    monkeypatch.setattr(keras.Variable, "assign", logged_assign)
    rows = {row.path: row for row in weight_table(load(checkpoint).config)}
    assert len(rows) == sum(event in rows for event in events)
    group = set()
    for event in events:
        if event in rows:
            assert group == set(rows[event].tensors)
            group = set()
        else:
            group.add(event)


def test_export_and_import_give_the_same_bits(checkpoint, checkpoint_weights, tmp_path):
    model = load(checkpoint)
    model.export_to_transformers(tmp_path / "two", max_shard_size="50KB")
    assert (tmp_path / "two" / INDEX).exists()
    assert_same_weights(weights(load(tmp_path / "two")), checkpoint_weights)
    model.export_to_transformers(tmp_path / "bf16", dtype="bfloat16")
    assert {a.dtype.name for a in load_file(tmp_path / "bf16" / SINGLE).values()} == {"bfloat16"}


def test_report_accounts_for_every_tensor(tmp_path):
    config, tensors = published("qwen3_dense")
    tensors["mtp.fc.weight"] = np.zeros((2, 2), "float32")
    tensors["model.rotary_emb.inv_freq"] = np.zeros((8,), "float32")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    report = load(save(tmp_path, config, tensors)).coverage_report
    assert set(report.unused) == {"mtp.fc.weight", "model.rotary_emb.inv_freq", "lm_head.weight"}
    assert len(report.copied) == 1 + 3 * 4 + 1
    assert len(report.transformed) == 3 * 7
    assert "14 copied, 21 transformed, 0 initialised, 3 unused: " in str(report)


def test_head_that_is_not_tied_is_refused(tmp_path):
    config, tensors = published("qwen3_dense")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight"):
        load(save(tmp_path, config, tensors))


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    config, tensors = published(SMALLEST)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    folder = save(tmp_path, config, tensors)
    misshapen = "1 misshapen: lm_head.weight (32, 71) instead of (71, 32)"
    assert_refused(folder, "missing: model.norm", "unexpected: model.extra", misshapen)


def test_many_names_are_cut_short(tmp_path):
    config, tensors = published(SMALLEST)
    tensors = {name: array for name, array in tensors.items() if ".experts." not in name}
    assert_refused(save(tmp_path, config, tensors), "24 missing", "and 14 more")
