"""Damaged indices and headers: refused by the name of the file, or read as they are."""

import json
import os
import random
import resource
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from qwen3_next.checkpoints.safetensors_files import INDEX, SINGLE, Checkpoint, TensorSpec, write
from qwen3_next.checkpoints.staging import COMMITTED, LIST
from tests.support.running import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="files know no backend")

ARRAYS = {"a": np.ones((2, 3), "float32"), "b": np.ones(4, "float16"), "n": np.ones((), "int32")}
VALUES = [None, True, 0, -1, 3, 2**31, 2**63, 2**64, 10**400, 2.0, "", "..", "a", "/etc/passwd"]
VALUES += ["F32", "F4", "U16", "X", [], [1], [0, 24], [24, 0], [-4, 0], [None], ["a"], {}, {"a": 1}]
VALUES += [[0, 2**62], ["model-1-of-1.safetensors"], "../a.safetensors", "sub/a.safetensors"]


def read_everything(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def saved(folder, max_shard_size="5GB"):
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    write(folder, specs, ARRAYS.values(), max_shard_size)
    return folder


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text, rest):
    return struct.pack("<Q", len(text)) + text + rest


def changed_header(data, rng):
    header, rest = header_of(data)
    name = rng.choice([*header, "extra"])
    fields = header.setdefault(name, {})
    key = rng.choice(["dtype", "shape", "data_offsets", "extra", None])
    if key is None:
        header[name] = rng.choice(VALUES)
    else:
        fields[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del fields[key]
    return with_header(json.dumps(header).encode(), rest)


def changed_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def longer(data, rng):
    return data + bytes(rng.randint(1, 9))


def accepted_by_the_library(path):
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


@pytest.mark.parametrize("change", [changed_header, changed_bytes, cut, longer])
def test_a_changed_file_is_accepted_exactly_where_the_library_accepts_it(change, tmp_path):
    path = saved(tmp_path) / SINGLE
    data, rng, refused = path.read_bytes(), random.Random(change.__name__), 0
    for _ in range(200):
        path.write_bytes(change(data, rng))
        try:
            Checkpoint(tmp_path)
            accepted = True
        except ValueError as error:
            assert str(path) in str(error)
            refused, accepted = refused + 1, False
        assert accepted == accepted_by_the_library(path)
        if accepted:
            try:
                read_everything(tmp_path)
            except ValueError as error:
                assert "dtype=" in str(error)
    assert refused > 50


def test_a_changed_index_is_refused_by_name(tmp_path):
    path = saved(tmp_path, max_shard_size="16") / INDEX
    index, rng = json.loads(path.read_text()), random.Random(0)
    for _ in range(200):
        changed = json.loads(json.dumps(index))
        place = rng.choice([changed, changed["weight_map"]])
        place[rng.choice([*place, "extra"])] = rng.choice(VALUES)
        text = json.dumps(rng.choice([changed, changed, changed, rng.choice(VALUES)]))
        path.write_text(rng.choice([text, text, text, text[:-2], "[" * 100_000]))
        try:
            found = read_everything(tmp_path)
        except ValueError as error:
            assert INDEX in str(error)
        else:
            assert found.keys() == ARRAYS.keys()


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "sub/a.safetensors", "a", 5, None])
def test_a_shard_is_a_file_beside_its_index(name, tmp_path):
    path = saved(tmp_path, max_shard_size="16") / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["a"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map\['a'\].* must be the name of a .safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-00001-of-00002.safetensors", LIST])
def test_a_named_pipe_is_refused_and_not_waited_for(name, tmp_path):
    saved(tmp_path, "5GB" if name == SINGLE else "16")
    path = tmp_path / name if name != LIST else tmp_path / COMMITTED / LIST
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name} must be a regular file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("claimed", [99_000_000, 10**9, 2**62])
def test_no_memory_is_taken_that_a_header_only_claims(claimed, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", claimed) + b'{"a":')
        file.truncate(min(claimed + 8, 10**10))  # a hole in the file takes no room on the disk
    with pytest.raises(ValueError, match=SINGLE):
        Checkpoint(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 120_000  # KiB, what the largest header takes that is allowed


def test_the_largest_dim_is_one_with_values(tmp_path):
    shapes = {"a": (0, 10**9), "b": (3,)}
    specs = [TensorSpec(name, shape, np.dtype("float32")) for name, shape in shapes.items()]
    write(tmp_path, specs, [np.zeros(shape, "float32") for shape in shapes.values()])
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.largest_dim == 3


def test_a_file_that_is_truncated_while_it_is_read_names_the_tensor(tmp_path):
    saved(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / SINGLE, 100)
        with pytest.raises(ValueError, match=f"{SINGLE} cannot be read at tensor 'a'"):
            checkpoint.read("a")
