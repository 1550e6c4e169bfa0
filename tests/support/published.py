"""Checkpoints that transformers wrote: fixtures, folders made of them, models loaded from those."""

import json

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextConfig
from qwen3_next.checkpoints import interchange
from qwen3_next.checkpoints.hugging_face_config import config_from_hugging_face
from qwen3_next.checkpoints.safetensors_files import TensorSpec, write
from tests.support.paths import FIXTURES

MODELS = ["next_4layer", "next_8layer", "next_ratio1", "qwen3_dense", "qwen3_moe"]
SMALLEST = "next_ratio1"


def published(name):
    """The `config.json` and the tensors of a fixture."""
    fixture = np.load(FIXTURES / f"{name}.npz")
    keys = [key for key in fixture if key.startswith("weights/")]
    tensors = {key.removeprefix("weights/"): fixture[key].astype("float32") for key in keys}
    return json.loads(str(fixture["config"])), tensors


def save(folder, config, tensors, max_shard_size="5GB"):
    """Writes a checkpoint and returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]
    write(folder, specs, tensors.values(), max_shard_size)
    return folder


def load(folder, model=Qwen3Next, **options):
    return model.from_preset(folder, progress=False, **options)


def weights(model):
    return {v.path: keras.ops.convert_to_numpy(v.value) for v in model.weights}


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        assert array.dtype == expected[path].dtype
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def assert_refused(folder, *words):
    """Loading raises an error with these words and leaves a model as it is."""
    model = Qwen3Next(Qwen3NextConfig(**config_from_hugging_face(published(SMALLEST)[0])))
    before = weights(model)
    with pytest.raises(ValueError) as error:
        interchange.load_hugging_face(model, folder, progress=False)
    assert all(word in str(error.value) for word in words), error.value
    assert_same_weights(weights(model), before)
