"""Layers in functional models: caches and statistics among inputs and outputs, unknown lengths."""

import keras
import numpy as np
import pytest
from keras import tree

from qwen3_next import Qwen3NextBackbone, layers
from tests.support.mtp_models import LIGHT
from tests.support.running import (
    BACKEND,
    CHEAPEST,
    assert_close,
    run,
    run_to_tensors,
    to_numpy,
)
from tests.support.small_models import random_ids, small

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="checked where it is compiled")
ROWS, TOKENS, WIDTH = 2, 5, 8
X = np.random.default_rng(0).normal(size=(ROWS, TOKENS, WIDTH)).astype("float32")


def attention(**options):
    return layers.GatedAttention(2, 1, 8, **options)


def delta_net(**options):
    return layers.GatedDeltaNet(1, 2, 4, 6, **options)


def moe(**options):
    return layers.SparseMoE(3, 2, 4, **options)


def linear_layer(**options):
    return layers.DecoderLayer(delta_net(**options), moe(**options), **options)


def full_layer(**options):
    return layers.DecoderLayer(attention(**options), layers.SwiGLU(4, **options), **options)


def module(**options):
    return layers.MultiTokenPrediction(full_layer(**options), **options)


def think_loop(**options):
    unit = layers.HaltingUnit(**options)
    made = [linear_layer(**options), full_layer(**options)]
    return layers.ThinkLoop(made, 2, unit, granularity="sequence", **options)


MIXERS, LAYERS = [attention, delta_net], [linear_layer, full_layer]
# A layer, its inputs, and what else it is given.
CASES = {
    **{make.__name__: (make, [X], {}) for make in LAYERS},
    "think_loop": (think_loop, [X], {}),
    "full_think_loop": (think_loop, [X], {"full_output": True}),
    "cached_think_loop": (think_loop, [X], {"cache": ...}),
    "module": (module, [X, X], {}),
    "routing": (moe, [X], {"return_routing": True}),
    "full_linear_layer": (linear_layer, [X], {"full_output": True}),
    "full_module": (module, [X, X], {"full_output": True}),
    **{f"cached_{make.__name__}": (make, [X], {"cache": ...}) for make in (*MIXERS, *LAYERS)},
    "cached_module": (module, [X, X], {"cache": ...}),
    **{
        f"replayable_{make.__name__}": (make, [X], {"cache": ..., "replayable": True})
        for make in MIXERS
    },
}
# What they return is a part of what others do, which go the same way.
PARTS = ["linear_layer", "think_loop", "module"]


def prepared(name, **options):
    """The layer of a case, its inputs, its tensors by name, and its other arguments."""
    make, inputs, arguments = CASES[name]
    layer, arguments = make(**options), dict(arguments)
    layer.build(*[x.shape for x in inputs])
    tensors = {}
    if arguments.pop("cache", None):
        tensors = {"cache": layer.init_cache(ROWS, 7), "lengths": np.zeros(ROWS, "int32")}
    return layer, inputs, tensors, arguments


def called(layer, inputs, tensors, arguments):
    def call(inputs, tensors):
        return layer(*inputs, **tensors, **arguments)

    return run_to_tensors(call, inputs, tensors, mode=CHEAPEST)


def symbolic(arrays):
    """An input for every array, of any number of rows and of tokens."""
    return tree.map_structure(
        lambda x: keras.Input(
            [None if n == TOKENS else n for n in x.shape[1:]],
            dtype=keras.backend.standardize_dtype(x.dtype),
        ),
        arrays,
    )


@pytest.mark.parametrize("name", [name for name in CASES if name not in PARTS])
def test_a_functional_model_from_its_file_gives_what_the_layer_gives(name, tmp_path):
    layer, inputs, tensors, arguments = prepared(name)
    expected = to_numpy(tree.flatten(called(layer, inputs, tensors, arguments)))
    places, named = symbolic(inputs), symbolic(tensors)
    outputs = layer(*places, **named, **arguments)
    model = keras.Model(tree.flatten([places, named]), outputs)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    arrays = to_numpy(tree.flatten([inputs, tensors]))
    for a, b in zip(tree.flatten(loaded.predict_on_batch(arrays)), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_symbolic_call_tells_shapes_and_dtypes(name):
    layer, inputs, tensors, arguments = prepared(name, dtype="mixed_bfloat16")
    outputs = called(layer, inputs, tensors, arguments)
    specs = layer(*symbolic(inputs), **symbolic(tensors), **arguments)
    tree.assert_same_structure(specs, outputs)
    for spec, output in zip(tree.flatten(specs), tree.flatten(outputs)):
        assert spec.dtype == keras.backend.standardize_dtype(output.dtype)
        assert len(spec.shape) == len(output.shape)
        assert all(n in (None, m) for n, m in zip(spec.shape, output.shape))


@pytest.mark.parametrize("make", MIXERS)
def test_a_symbolic_call_refuses_what_a_call_refuses(make):
    with pytest.raises(ValueError, match="`replayable` pass continues a `cache`"):
        make()(keras.Input((None, WIDTH)), replayable=True)


def test_a_module_without_attention_takes_no_cache():
    layer = layers.MultiTokenPrediction(layers.SwiGLU(4))
    with pytest.raises(ValueError, match=r"`cache`.*`body`.*Received"):
        layer(X, X, cache=attention().init_cache(ROWS, 7))


def test_time_distributed_models_read_every_step():
    backbone = small(Qwen3NextBackbone, **LIGHT)
    ids = random_ids(2 * 3, 5).reshape(2, 3, 5)
    expected = np.stack([run(backbone, ids[:, i]) for i in range(3)], axis=1)
    inputs = keras.Input((3, 5), dtype="int32")
    model = keras.Model(inputs, keras.layers.TimeDistributed(backbone)(inputs))
    assert_close(model.predict(ids, verbose=0), expected, 1e-5)
