"""Weights that are made, loaded and saved as shards."""

import contextlib
import functools

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next
from tests.support.devices import distribution_of, eight_devices
from tests.support.process_runs import SIZES
from tests.support.running import BACKEND

if BACKEND == "jax":
    import jax

pytestmark = eight_devices
MESH = "data=2,expert=4"
NAMES = ("preset", "published", "model.keras")
ALL, OWN = {(8, 32, 32), (8, 16, 32)}, {(2, 32, 32), (2, 16, 32)}  # experts on a device
MAKERS = ("asarray", "array", "device_put", "make_array_from_callback")


def made(**options):
    keras.utils.set_random_seed(1)
    return Qwen3Next.from_variant("tiny", **SIZES, **options)


def values(model):
    return [np.array(variable.value) for variable in model.weights]


@contextlib.contextmanager
def arrays_on_a_device(monkeypatch):
    """The shapes that one device has of the arrays that are made from the host."""
    shapes = set()

    def noted(make):
        @functools.wraps(make)
        def call(*args, **kwargs):
            array = make(*args, **kwargs)
            if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
                shapes.add(array.addressable_shards[0].data.shape)
            return array

        return call

    with monkeypatch.context() as patch:
        for module in (jax, jax.numpy):
            for name in set(MAKERS) & set(vars(module)):
                patch.setattr(module, name, noted(getattr(module, name)))
        yield shapes


def load(name, folder):
    if name.endswith(".keras"):
        return keras.saving.load_model(folder / name)
    return Qwen3Next.from_preset(folder / name, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with what a model in shards has saved, and its values."""
    folder = tmp_path_factory.mktemp("saved")
    with distribution_of(MESH):
        model = made()
        model.save_to_preset(folder / "preset")
        model.export_to_transformers(folder / "published")
        model.save(folder / "model.keras")
    return folder, values(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_gives_the_same_weights_on_one_device_and_on_eight(dtype):
    with distribution_of(MESH):
        sharded = made(dtype=dtype)
    for one, eight in zip(values(made(dtype=dtype)), values(sharded), strict=True):
        np.testing.assert_array_equal(one, eight)


def test_no_device_is_given_all_experts_when_they_are_made(monkeypatch):
    with distribution_of(MESH), arrays_on_a_device(monkeypatch) as shapes:
        made()
    assert OWN <= shapes
    assert not ALL & shapes


@pytest.mark.parametrize("name", NAMES[:2])
def test_no_device_is_given_all_experts_when_they_are_loaded(saved, name, monkeypatch):
    with distribution_of(MESH), arrays_on_a_device(monkeypatch) as shapes:
        load(name, saved[0])
    assert OWN <= shapes
    assert not ALL & shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", [None, MESH, "expert=4,tensor=2"])
def test_what_eight_devices_saved_loads_to_the_bit(saved, name, mesh):
    folder, expected = saved
    with contextlib.nullcontext() if mesh is None else distribution_of(mesh):
        found = values(load(name, folder))
    for value, known in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, known)


def test_loaded_weights_lie_as_made_ones(saved):
    with distribution_of(MESH):
        pairs = zip(made().weights, load("preset", saved[0]).weights, strict=True)
        for variable, loaded in pairs:
            assert loaded.value.sharding.is_equivalent_to(variable.value.sharding, variable.ndim)


def test_optimizer_state_comes_back_in_shards(tmp_path):
    with distribution_of(MESH):
        model = made()
        model.compile("adam")
        model.fit(np.ones((8, 4), "int32"), verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    for variable, other in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(other.value), np.array(variable.value))
        assert other.value.sharding.is_equivalent_to(variable.value.sharding, variable.ndim)
