"""What is refused on several devices: meshes, weights and models that do not fit."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3NextConfig, distribute, layout_map
from qwen3_next.scale import layouts
from tests.support.devices import WIDE, distribution_of, eight_devices, jax_only
from tests.support.running import BACKEND
from tests.support.small_models import ONE_LAYER, SMALL, random_ids, small

IDS = random_ids(8, 6)
LIGHT = {**WIDE, **ONE_LAYER}


def used(**options):
    """A model that has run where it was made."""
    model = small(**{**LIGHT, **options})
    model.compile("adamw")
    for name in ("predict", "evaluate", "extend"):
        CALLS[name](model)
    return model


@functools.cache
def made_before():
    return used()


@functools.cache
def left_behind():
    with distribution_of("data=8"):
        return used()


CALLS = {
    "call": lambda model: model(IDS),
    "fit": lambda model: model.fit(IDS, verbose=0),
    "evaluate": lambda model: model.evaluate(IDS, verbose=0),
    "predict": lambda model: model.predict(IDS, verbose=0),
    "train_on_batch": lambda model: model.train_on_batch(IDS),
    "test_on_batch": lambda model: model.test_on_batch(IDS),
    "predict_on_batch": lambda model: model.predict_on_batch(IDS),
    "generate": lambda model: model.generate(list(IDS), max_new_tokens=2),
    "extend": lambda model: model.extend(IDS, model.init_cache(8, 8)),
}


@eight_devices
@pytest.mark.parametrize("name", CALLS)
def test_a_model_made_before_is_refused(name):
    model = made_before()
    with distribution_of("data=8"), pytest.raises(ValueError, match="before the model is made"):
        CALLS[name](model)
    assert model.predict(IDS, verbose=0).shape == (8, 6, 64)


@eight_devices
def test_a_large_model_made_before_is_refused_before_its_optimizer_is_made(monkeypatch):
    monkeypatch.setattr(layouts, "SMALL_BYTES", 0)
    model = small(**LIGHT)
    model.compile("adamw")
    with distribution_of("data=8"), pytest.raises(ValueError, match="before the model is made"):
        model.fit(IDS, verbose=0)
    assert not model.optimizer.built


@eight_devices
@pytest.mark.parametrize("name", CALLS)
def test_a_model_whose_distribution_ended_is_refused(name):
    with pytest.raises(ValueError, match="under no distribution"):
        CALLS[name](left_behind())


@eight_devices
def test_a_model_of_another_mesh_is_refused_and_one_of_an_equal_mesh_is_not():
    model = left_behind()
    with distribution_of("expert=8"), pytest.raises(ValueError, match="data=1,expert=8,tensor=1"):
        model.predict(IDS, verbose=0)
    with distribution_of("data=8"):
        assert model.predict(IDS, verbose=0).shape == (8, 6, 64)


@jax_only
@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("data=3,expert=5", "for 15, and .* devices"),
        ("data=15", "--xla_force_host_platform_device_count=15, set before jax is imported"),
        ("data=2,model=4", "unknown axes"),
        ({"data": 8}, "must be text"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, words):
    with pytest.raises(ValueError, match=words):
        distribute(mesh)
    assert keras.distribution.distribution() is None


@eight_devices
def test_too_many_devices_are_named():
    with pytest.raises(ValueError, match="Name a part of them with `devices`"):
        distribute("data=2")


@eight_devices
@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"vocab_size": 61}, "tensor=8", "embeddings` cannot be split: its dim `vocab` of 61"),
        ({"num_experts": 5}, "expert=8", "gate_up` cannot be split: its dim `experts` of 5"),
        ({"num_experts": 4}, "expert=8", "gate_up` cannot be split: its dim `experts` of 4"),
        (
            {"linear_num_key_heads": 4},
            "tensor=8",
            "cannot be split: its dim `linear_key_heads` of 4",
        ),
    ],
)
def test_a_weight_that_a_mesh_does_not_divide_is_refused(changes, mesh, words):
    with distribution_of(mesh) as parallel:
        with pytest.raises(ValueError, match=words):
            small(**{**LIGHT, **changes})
        config = Qwen3NextConfig(**{**SMALL, **LIGHT, **changes})
        with pytest.raises(ValueError, match=words):
            layout_map(parallel.device_mesh, config)


@eight_devices
def test_a_large_variable_without_a_row_needs_a_layout_of_its_own():
    def table(path="table"):
        return keras.Variable(np.zeros((512, 1024), "float32"), name=path)

    with distribution_of("data=8"):
        assert keras.Variable(np.zeros((8, 8)), name="small").value.sharding.is_fully_replicated
        with pytest.raises(ValueError, match=r"`table` is large .*shape=\(512, 1024\)"):
            table()
    given = {"table": (("data", "expert"), "tensor"), "whole": (None, None)}
    with distribution_of("data=2,expert=2,tensor=2", layouts=given):
        assert table().value.addressable_shards[0].data.shape == (128, 512)
        assert table("whole").value.sharding.is_fully_replicated


@jax_only
@pytest.mark.parametrize(
    "given",
    [
        {"a": ("model",)},
        {"a": "data"},
        {"a": 5},
        {"a": ("data", "data")},
        {"a": (["data"],)},
        {"(": ("data",)},
        {None: (None,)},
        [1],
    ],
)
def test_layouts_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="layouts"), distribution_of("data=1", layouts=given):
        pass


@jax_only
@pytest.mark.parametrize("devices", [5, "cpu:0", ["nonsense"], [None], [["cpu:0"]]])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ValueError, match=r"`devices` must be .*Received: devices="):
        distribute("data=1", devices=devices)
    assert keras.distribution.distribution() is None


@jax_only
@pytest.mark.parametrize("num_labels", [-5, "a", 2.5])
def test_a_number_of_labels_that_is_none_is_refused(num_labels):
    mesh = keras.distribution.DeviceMesh((1,), ("data",), keras.distribution.list_devices()[:1])
    with pytest.raises(ValueError, match=r"`num_labels` must be .*Received: num_labels="):
        layout_map(mesh, "tiny", num_labels=num_labels)


@jax_only
@pytest.mark.parametrize("mesh", ["data=2", None])
def test_a_map_needs_a_mesh_of_devices(mesh):
    with pytest.raises(ValueError, match="`mesh` must be a DeviceMesh"):
        layout_map(mesh, "tiny")


@pytest.mark.skipif(BACKEND == "jax", reason="there it works")
def test_other_backends_are_refused_with_what_they_have():
    for call in (lambda: distribute("data=1"), lambda: layout_map(None, "tiny")):
        with pytest.raises(RuntimeError, match=f"JAX .*MirroredStrategy.*{BACKEND}"):
            call()
