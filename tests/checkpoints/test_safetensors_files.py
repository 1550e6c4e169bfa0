"""Safetensors files: damaged ones are refused by name, writing is all or nothing."""

import json

import keras
import numpy as np
import pytest

from qwen3_next.checkpoints.safetensors_files import INDEX, SINGLE, TensorSpec, write
from tests.support.published import (
    SMALLEST,
    assert_refused,
    assert_same_weights,
    load,
    published,
    save,
    weights,
)


def test_quantised_tensor_is_refused_by_name(tmp_path, checkpoint):
    text = (checkpoint / SINGLE).read_bytes()
    assert text.count(b'"F32"') > 1
    (tmp_path / SINGLE).write_bytes(text.replace(b'"F32"', b'"I32"', 1))
    assert_refused(tmp_path, "Tensor", "must be one of", "dtype=I32")


@pytest.mark.parametrize("kept", [4, 1000, -1])
def test_truncated_file_is_refused_by_name(tmp_path, checkpoint, kept):
    (tmp_path / SINGLE).write_bytes((checkpoint / SINGLE).read_bytes()[:kept])
    assert_refused(tmp_path, SINGLE, "truncated")


@pytest.mark.parametrize("place", [8, 40])
def test_corrupt_header_is_refused_by_name(tmp_path, checkpoint, place):
    data = bytearray((checkpoint / SINGLE).read_bytes())
    data[place : place + 3] = b"\xff}["
    (tmp_path / SINGLE).write_bytes(data)
    assert_refused(tmp_path, SINGLE, "corrupt")


def test_offsets_that_overlap_are_refused(tmp_path, checkpoint):
    data = (checkpoint / SINGLE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[name]["data_offsets"] = [n - 4 for n in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    start = 8 + int.from_bytes(data[:8], "little")
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    assert_refused(tmp_path, SINGLE, "corrupt", name)


def test_damaged_shards_are_refused_by_name(tmp_path):
    folder = save(tmp_path, *published(SMALLEST), max_shard_size="50KB")
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
def test_failed_saving_leaves_the_folder_as_it_was(checkpoint, tmp_path, monkeypatch, method):
    model = load(checkpoint)
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


def test_saving_again_leaves_no_stale_weights(checkpoint, checkpoint_weights, tmp_path):
    model = load(checkpoint)
    (tmp_path / "tokenizer.json").write_text("{}")
    for size, files in (("20KB", 10), ("5GB", 3), ("50KB", 6)):
        model.export_to_transformers(tmp_path, max_shard_size=size)
        assert len(list(tmp_path.iterdir())) == files
        assert_same_weights(weights(load(tmp_path)), checkpoint_weights)


def test_array_that_is_not_as_announced_is_refused(tmp_path):
    spec = TensorSpec("a", (2,), np.dtype("float32"))
    for arrays in ([], [np.zeros(3, "float32")], [np.zeros(2)]):
        with pytest.raises(ValueError, match="name='a'"):
            write(tmp_path, [spec], arrays)
    with pytest.raises(ValueError, match="max_shard_size"):
        write(tmp_path, [spec], [], max_shard_size="5 apples")
