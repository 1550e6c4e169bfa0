"""Several devices for tests: simulated ones, which `tests/conftest.py` sets for `tests/scale`."""

import contextlib

import keras
import numpy as np
import pytest

from qwen3_next import distribute
from tests.support.running import BACKEND

MESHES = ("data=8", "expert=8", "data=2,expert=4", "data=2,expert=2,tensor=2")
# Divides over every axis of 8 devices, but for the key and value heads.
WIDE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "num_experts": 16,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": (1,),
}


def device_count():
    if BACKEND != "jax":
        return 0  # that `keras.distribution` would split weights over
    return len(keras.distribution.list_devices())


jax_only = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution splits on JAX alone")
eight_devices = pytest.mark.skipif(
    device_count() < 8, reason="needs eight devices: `pytest tests/scale` on JAX simulates them"
)


@contextlib.contextmanager
def distribution_of(mesh, **options):
    """`distribute(mesh)` on the first devices for as long as it lasts."""
    places = np.prod([int(part.split("=")[1]) for part in mesh.split(",")])
    devices = keras.distribution.list_devices()[:places]
    before = keras.distribution.distribution()
    try:
        yield distribute(mesh, devices=devices, **options)
    finally:
        keras.distribution.set_distribution(before)


def shard_shapes(variable):
    """Shapes of what the devices hold of a variable, each once."""
    return {tuple(shard.data.shape) for shard in variable.value.addressable_shards}


def held_bytes(variables):
    """Bytes of variables on each device, by its number."""
    held = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held
