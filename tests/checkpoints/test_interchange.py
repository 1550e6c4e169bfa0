"""Published checkpoints and presets in and out, against tensors that transformers wrote."""

import json
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen3_next import Qwen3Next, Qwen3NextClassifier, Qwen3NextConfig
from qwen3_next.checkpoints import interchange
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.checkpoints.safetensors_files import INDEX, SINGLE, Checkpoint, TensorSpec, write
from qwen3_next.models.weight_table import PARTS, weight_table
from tests.support.published import FIXTURES, load, published, save, weights
from tests.support.running import BACKEND, run, weight_arrays, with_weights

MODELS = ["next_4layer", "next_8layer", "next_ratio1", "qwen3_dense", "qwen3_moe"]
SMALL = "next_ratio1"


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        assert array.dtype == expected[path].dtype
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def assert_refused(folder, *words):
    """Loading raises an error with these words and leaves a model as it is."""
    model = Qwen3Next(Qwen3NextConfig(**config_from_hugging_face(published(SMALL)[0])))
    before = weights(model)
    with pytest.raises(ValueError) as error:
        interchange.load_hugging_face(model, folder, progress=False)
    assert all(word in str(error.value) for word in words), error.value
    assert_same_weights(weights(model), before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A published checkpoint in one file, written by the reference implementation."""
    folder = tmp_path_factory.mktemp("small")
    config, tensors = published(SMALL)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)
    return folder


@pytest.fixture(scope="module")
def small_weights(small):
    return weights(load(small))


@pytest.mark.parametrize("name", MODELS)
def test_published_checkpoint_gives_published_logits(name, tmp_path):
    fixture = np.load(FIXTURES / f"{name}.npz")
    case = next(c for c in ("length_40", "length_64", "length_65") if f"case/{c}/logits" in fixture)
    model = load(save(tmp_path, *published(name)))
    mode = "jit" if BACKEND == "jax" else "eager"
    ids = fixture[f"case/{case}/input_ids"]
    logits = run(with_weights(model), *weight_arrays(model), ids, mode=mode)
    logits = logits[:, fixture[f"case/{case}/positions"]]
    np.testing.assert_allclose(logits, fixture[f"case/{case}/logits"], atol=1e-4, rtol=0)


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


def test_shards_load_as_one_file_does(tmp_path, small_weights):
    folder = save(tmp_path, *published(SMALL), max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert_same_weights(weights(load(folder)), small_weights)


def test_fused_experts_load_as_separate_ones_do(tmp_path, small_weights):
    config, tensors = published(SMALL)
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors.pop(f"{base}.{e}.{name}_proj.weight") for name in ("gate", "up", "down")]
            for e in range(config["num_experts"])
        ]
        tensors[f"{base}.gate_up_proj"] = np.stack([np.concatenate(e[:2]) for e in each])
        tensors[f"{base}.down_proj"] = np.stack([e[2] for e in each])
    assert_same_weights(weights(load(save(tmp_path, config, tensors))), small_weights)


def test_bfloat16_tensors_are_not_widened(tmp_path, monkeypatch, small_weights):
    config, tensors = published(SMALL)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    folder = save(tmp_path, config, tensors)
    wide = []
    original = interchange._Tensors.__getitem__
    monkeypatch.setattr(
        interchange._Tensors,
        "__getitem__",
        lambda self, i: wide.append(original(self, i).dtype) or original(self, i),
    )
    loaded = weights(load(folder, dtype="bfloat16"))
    for path, array in loaded.items():
        expected = small_weights[path].astype(ml_dtypes.bfloat16).astype("float32")
        np.testing.assert_array_equal(array.astype("float32"), expected)
    assert wide.count(np.float32) == sum(array.dtype == np.float32 for array in loaded.values())


def test_tensors_are_read_just_before_their_variable_is_assigned(small, monkeypatch):
    read, assign, events = Checkpoint.read, keras.Variable.assign, []

    def logged_read(self, name):
        events.append(name)
        return read(self, name)

    def logged_assign(self, value):
        events.append(self.path)
        return assign(self, value)

    monkeypatch.setattr(Checkpoint, "read", logged_read)
    monkeypatch.setattr(keras.Variable, "assign", logged_assign)
    rows = {row.path: row for row in weight_table(load(small).config)}
    assert len(rows) == sum(event in rows for event in events)
    group = set()
    for event in events:
        if event in rows:
            assert group == set(rows[event].tensors)
            group = set()
        else:
            group.add(event)


def test_export_and_import_give_the_same_bits(small, small_weights, tmp_path):
    model = load(small)
    model.export_to_transformers(tmp_path / "two", max_shard_size="50KB")
    assert (tmp_path / "two" / INDEX).exists()
    assert_same_weights(weights(load(tmp_path / "two")), small_weights)
    model.export_to_transformers(tmp_path / "bf16", dtype="bfloat16")
    assert {a.dtype.name for a in load_file(tmp_path / "bf16" / SINGLE).values()} == {"bfloat16"}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_preset_gives_the_same_bits_and_configuration(small, small_weights, tmp_path, shard):
    model = load(small, dropout=0.25, gradient_checkpointing=True)
    model.save_to_preset(tmp_path, max_shard_size=shard)
    again = load(tmp_path)
    assert (again.config, again.gradient_checkpointing) == (model.config, True)
    assert_same_weights(weights(again), small_weights)
    assert load(tmp_path, rope_theta=5.0).config.rope_theta == 5.0


def test_preset_holds_what_no_published_type_can(tmp_path):
    config = Qwen3NextConfig(**config_from_hugging_face(published(SMALL)[0]))
    model = Qwen3Next(config.replace(normalization_type="rms_norm", ffn_type="geglu"))
    with pytest.raises(ValueError, match="attention_type='gated_attention'"):
        model.export_to_transformers(tmp_path / "published")
    assert not (tmp_path / "published").exists()
    model.save_to_preset(tmp_path / "own")
    assert_same_weights(weights(load(tmp_path / "own")), weights(model))


def test_bfloat16_preset_keeps_every_dtype(small, tmp_path):
    model = load(small, dtype="bfloat16")
    model.save_to_preset(tmp_path)
    again = load(tmp_path)
    assert again.dtype_policy.name == "bfloat16"
    assert_same_weights(weights(again), weights(model))


def test_language_model_becomes_a_classifier(small, small_weights, tmp_path):
    load(small).save_to_preset(tmp_path)
    for folder, head in ((small, "lm_head.weight"), (tmp_path, "lm_head/kernel")):
        model = load(folder, Qwen3NextClassifier, num_labels=3)
        assert model.coverage_report.initialised == ("score/kernel",)
        assert list(model.coverage_report.unused) == [head]
        loaded = weights(model)
        del loaded["score/kernel"]
        backbone = {k: v for k, v in small_weights.items() if k != "lm_head/kernel"}
        assert_same_weights(loaded, backbone)


def test_classifier_survives_both_formats(small, tmp_path):
    model = load(small, Qwen3NextClassifier, num_labels=3)
    model.save_to_preset(tmp_path / "own")
    model.export_to_transformers(tmp_path / "published")
    for folder in ("own", "published"):
        again = load(tmp_path / folder, Qwen3NextClassifier)
        assert again.coverage_report.initialised == ()
        assert_same_weights(weights(again), weights(model))
    fields = json.loads((tmp_path / "published" / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3NextForSequenceClassification"]


@pytest.mark.parametrize("name", MODELS)
def test_table_lists_every_weight(name):
    config = Qwen3NextConfig(**config_from_hugging_face(published(name)[0]))
    for model in (Qwen3Next(config), Qwen3NextClassifier(config, num_labels=3)):
        rows = weight_table(config, getattr(model, "num_labels", None))
        assert {row.part for row in rows} <= set(PARTS)
        listed = {row.path: row.shape for row in rows}
        assert listed == {v.path: tuple(v.shape) for v in model.weights}
        assert len(listed) == len(rows)


def test_table_counts_the_published_model():
    rows = weight_table(Qwen3NextConfig.from_variant("80b_a3b"))
    assert sum(row.size for row in rows) == 79_674_391_296
    assert {row.part for row in rows} == set(PARTS) - {"mlp", "mtp"}


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
    config, tensors = published(SMALL)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    folder = save(tmp_path, config, tensors)
    misshapen = "1 misshapen: lm_head.weight (32, 71) instead of (71, 32)"
    assert_refused(folder, "missing: model.norm", "unexpected: model.extra", misshapen)


def test_many_names_are_cut_short(tmp_path):
    config, tensors = published(SMALL)
    tensors = {name: array for name, array in tensors.items() if ".experts." not in name}
    assert_refused(save(tmp_path, config, tensors), "24 missing", "and 14 more")


def test_quantised_tensor_is_refused_by_name(tmp_path, small):
    text = (small / SINGLE).read_bytes()
    assert text.count(b'"F32"') > 1
    (tmp_path / SINGLE).write_bytes(text.replace(b'"F32"', b'"I32"', 1))
    assert_refused(tmp_path, "Tensor", "must be one of", "dtype=I32")


@pytest.mark.parametrize("kept", [4, 1000, -1])
def test_truncated_file_is_refused_by_name(tmp_path, small, kept):
    (tmp_path / SINGLE).write_bytes((small / SINGLE).read_bytes()[:kept])
    assert_refused(tmp_path, SINGLE, "truncated")


@pytest.mark.parametrize("place", [8, 40])
def test_corrupt_header_is_refused_by_name(tmp_path, small, place):
    data = bytearray((small / SINGLE).read_bytes())
    data[place : place + 3] = b"\xff}["
    (tmp_path / SINGLE).write_bytes(data)
    assert_refused(tmp_path, SINGLE, "corrupt")


def test_offsets_that_overlap_are_refused(tmp_path, small):
    data = (small / SINGLE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[name]["data_offsets"] = [n - 4 for n in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    start = 8 + int.from_bytes(data[:8], "little")
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    assert_refused(tmp_path, SINGLE, "corrupt", name)


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = save(tmp_path, *published(SMALL), max_shard_size="50KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert_refused(folder, shard.name, "truncated", "tensor")
    shard.unlink()
    assert_refused(folder, shard.name, "missing")
    shard.write_bytes(data)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.nowhere.weight"] = shard.name
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, shard.name, "model.nowhere.weight")
    (folder / INDEX).write_text("{")
    assert_refused(folder, INDEX)


@pytest.mark.parametrize("method", ["export_to_transformers", "save_to_preset"])
def test_failed_saving_leaves_the_folder_as_it_was(small, tmp_path, monkeypatch, method):
    model = load(small)
    getattr(model, method)(tmp_path / "old", max_shard_size="50KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    convert, calls = keras.ops.convert_to_numpy, []

    def fail_later(x):
        calls.append(x)
        if len(calls) > 9:
            raise OSError("disk full")
        return convert(x)

    monkeypatch.setattr(keras.ops, "convert_to_numpy", fail_later)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            getattr(model, method)(tmp_path / folder, max_shard_size="20KB")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_saving_again_leaves_no_stale_weights(small, small_weights, tmp_path):
    model = load(small)
    (tmp_path / "tokenizer.json").write_text("{}")
    for size, files in (("20KB", 10), ("5GB", 3), ("50KB", 6)):
        model.export_to_transformers(tmp_path, max_shard_size=size)
        assert len(list(tmp_path.iterdir())) == files
        assert_same_weights(weights(load(tmp_path)), small_weights)


def test_array_that_is_not_as_announced_is_refused(tmp_path):
    spec = TensorSpec("a", (2,), np.dtype("float32"))
    for arrays in ([], [np.zeros(3, "float32")], [np.zeros(2)]):
        with pytest.raises(ValueError, match="name='a'"):
            write(tmp_path, [spec], arrays)
    with pytest.raises(ValueError, match="max_shard_size"):
        write(tmp_path, [spec], [], max_shard_size="5 apples")


def test_hub_presets_need_the_hub_client(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"qwen3-next-keras\[hf\]"):
        load("hf://someone/something")


def test_hub_presets_are_downloaded(monkeypatch, small, small_weights):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "someone/something"
            return str(small)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert_same_weights(weights(load("hf://someone/something")), small_weights)


def test_directories_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config.json"):
        load(tmp_path)
    for text, word in (
        ("{", "not valid JSON"),
        ("[]", "model_type"),
        ('{"model_type": "llama"}', "llama"),
        ('{"registered_name": "nobody>Knows", "config": {}}', "nobody>Knows"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            load(tmp_path)
