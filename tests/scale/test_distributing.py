"""Models made after `distribute`: what every device holds."""

import keras
import numpy as np
import pytest

from qwen3_next import GroupedAdamW, MTPConfig, Qwen3NextBackbone, layout_map
from qwen3_next.layers.initializers import Normal
from tests.support.devices import (
    MESHES,
    WIDE,
    distribution_of,
    eight_devices,
    held_bytes,
    shard_shapes,
)
from tests.support.small_models import ONE_LAYER, random_ids, small

pytestmark = eight_devices
EMBEDDING = "model/embed_tokens/embeddings"
GATE_UP = "model/layers_0/mlp/experts/gate_up"
QUERY, KEY = "model/layers_1/self_attn/q_proj/kernel", "model/layers_1/self_attn/k_proj/kernel"
DOWN, CONV = "model/layers_1/mlp/down_proj/kernel", "model/layers_0/linear_attn/conv1d"
NORM, ROUTER = "model/norm/weight", "model/layers_0/mlp/gate/kernel"
WHOLE = {
    EMBEDDING: (64, 32),
    GATE_UP: (16, 32, 24),
    QUERY: (32, 8, 16),
    KEY: (32, 2, 8),
    DOWN: (16, 32),
    CONV: (4, 8, 42),
    NORM: (32,),
    ROUTER: (32, 16),
}
SPLIT = {
    ("data=8", False): {},
    ("expert=8", False): {GATE_UP: (2, 32, 24)},
    ("data=2,expert=4", False): {GATE_UP: (4, 32, 24)},
    ("data=2,expert=2,tensor=2", False): {
        EMBEDDING: (32, 32),
        GATE_UP: (4, 32, 24),
        QUERY: (32, 4, 16),
        KEY: (32, 1, 8),
        DOWN: (8, 32),
        CONV: (4, 4, 42),
    },
    ("tensor=4", False): {
        EMBEDDING: (16, 32),
        GATE_UP: (4, 32, 24),
        QUERY: (32, 2, 16),
        DOWN: (4, 32),
        CONV: (4, 2, 42),
    },
    ("data=2,expert=4", True): {
        EMBEDDING: (64, 4),
        GATE_UP: (4, 16, 24),
        QUERY: (4, 8, 16),
        KEY: (4, 2, 8),
        DOWN: (16, 4),
    },
}


def shapes(model):
    return {v.path: shard_shapes(v) for v in model.weights if v.path in WHOLE}


@pytest.mark.parametrize(("mesh", "fsdp"), SPLIT)
def test_a_device_holds_its_part_of_each_weight(mesh, fsdp):
    with distribution_of(mesh, fsdp=fsdp):
        found = shapes(small(**WIDE))
    assert found == {path: {shape} for path, shape in {**WHOLE, **SPLIT[mesh, fsdp]}.items()}


def of_plain_keras(model, **options):
    """A distribution of Keras' own over eight devices, with the map of a model."""
    mesh = keras.distribution.DeviceMesh((2, 2, 2), ("data", "expert", "tensor"))
    layouts = layout_map(mesh, model, **options)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_map_of_a_model_gives_the_same(fsdp):
    model = small(**WIDE)
    for known in (model, model.config):
        with of_plain_keras(known, fsdp=fsdp).scope():
            found = shapes(small(**WIDE))
        with distribution_of("data=2,expert=2,tensor=2", fsdp=fsdp):
            assert found == shapes(small(**WIDE))


def test_a_model_inside_of_another_and_a_backbone_of_any_name_are_split():
    class Wrapper(keras.layers.Layer):
        def build(self, shape):
            self.inner = small(Qwen3NextBackbone, **WIDE, name="trunk")

    for scope in (distribution_of("expert=8"), of_plain_keras(small(**WIDE).config).scope()):
        with scope:
            layer = Wrapper(name="outer")
            layer.build(None)
            (found,) = [v for v in layer.weights if v.path.endswith("layers_0/mlp/experts/gate_up")]
        assert found.path.startswith("outer/")
        assert shard_shapes(found) < {(2, 32, 24), (4, 32, 24)}


def test_weights_are_those_of_one_device():
    expected = small(**WIDE)
    with distribution_of("data=2,expert=2,tensor=2", fsdp=True):
        found = small(**WIDE)
    for one, other in zip(found.weights, expected.weights):
        np.testing.assert_array_equal(np.asarray(one.value), np.asarray(other.value))


OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(gradient_accumulation_steps=2, use_ema=True),
    "GroupedAdamW": lambda: GroupedAdamW(1e-3, {"experts": 0.5}),
    "Muon": lambda: keras.optimizers.Muon(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_split_like_its_weights(name):
    with distribution_of("data=2,expert=2,tensor=2", fsdp=True):
        model = small(**WIDE)
        optimizer = OPTIMIZERS[name]()
        optimizer.build(model.trainable_variables)
        weights = {v.path.replace("/", "_"): v for v in model.trainable_variables}
        checked = 0
        for state in optimizer.variables:
            of = [v for path, v in weights.items() if state.name.startswith(f"{path}_")]
            if of and state.shape == of[0].shape:
                assert state.value.sharding == of[0].value.sharding
                checked += 1
            else:
                assert state.value.size < 2, state.path
    assert checked >= len(weights)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_bytes_of_a_device_fall_with_the_devices(mesh):
    kind = {**WIDE, "mtp": MTPConfig(num_predict_tokens=2, speculation_lookahead=2)}
    with distribution_of("data=1"):
        (alone,) = held_bytes(small(**kind).weights).values()
    with distribution_of(mesh):
        held = held_bytes(small(**kind).weights)
    assert len(held) == 8 and len(set(held.values())) == 1
    assert held[0] < 0.8 * alone


def test_training_leaves_everything_where_it_was():
    with distribution_of("data=2,expert=2,tensor=2"):
        model = small(**{**WIDE, **ONE_LAYER})
        model.compile("adamw")
        model.optimizer.build(model.trainable_variables)
        everything = [*model.weights, *model.optimizer.variables]
        before = [v.value.sharding for v in everything]
        model.fit(random_ids(8, 6), verbose=0)
        assert [v.value.sharding for v in everything] == before


@pytest.mark.parametrize("initializer", [Normal(0.1), "zeros"])
def test_a_large_variable_is_never_whole_on_one_device(initializer, monkeypatch):
    from keras.src.backend.jax import distribution_lib

    placed = []
    keras_places = distribution_lib.distribute_tensor

    def places(value, layout):
        placed.append(value)
        return keras_places(value, layout)

    monkeypatch.setattr(distribution_lib, "distribute_tensor", places)
    shape = (16, 1024, 640)  # 40 MiB; on eight devices Keras has a way of its own from 31 MiB on
    with distribution_of("expert=8", layouts={"large": ("expert", None, None)}):
        large = keras.Variable(initializer, shape=shape, name="large")
    assert shard_shapes(large) == {(2, 1024, 640)}
    assert not any(value.sharding.is_fully_replicated for value in placed)
