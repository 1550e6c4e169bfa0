"""Checkpoints that transformers wrote: fixtures on disk, folders made of them, models loaded from those."""

import json
from pathlib import Path

import keras
import numpy as np

from qwen3_next import Qwen3Next
from qwen3_next.checkpoints.safetensors_files import TensorSpec, write

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
