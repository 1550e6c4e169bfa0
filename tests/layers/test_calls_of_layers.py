"""A layer refuses, by name, tensors that do not fit the shapes which its call documents."""

import keras
import numpy as np
import pytest

from qwen3_next import layers
from tests.support.running import BACKEND

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="arguments are read on the host")

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
MASK, SEGMENTS = np.ones((2, 3), "bool"), np.zeros((2, 3), "int32")
LENGTHS = np.zeros(2, "int32")


def attention():
    return layers.GatedAttention(2, 1, 8)


def delta_net():
    return layers.GatedDeltaNet(1, 2, 4, 6)


def moe():
    return layers.SparseMoE(3, 2, 4)


def decoder_layer():
    return layers.DecoderLayer(attention(), layers.SwiGLU(6))


def thinking():
    return layers.ThinkLoop([decoder_layer()], 2)


ROWS = {"x": X, "padding_mask": MASK}
# Layers, and what they are called with.
CALLS = {
    "GatedAttention": (attention, {**ROWS, "segment_ids": SEGMENTS}),
    "GatedDeltaNet": (delta_net, {**ROWS, "segment_ids": SEGMENTS}),
    "DecoderLayer": (decoder_layer, {**ROWS, "segment_ids": SEGMENTS, "updates": MASK}),
    "SparseMoE": (moe, ROWS),
    "ThinkLoop": (thinking, ROWS),
    "MultiTokenPrediction": (
        lambda: layers.MultiTokenPrediction(decoder_layer()),
        {"embedding": X, "hidden": X, "padding_mask": MASK, "segment_ids": SEGMENTS},
    ),
    "SwiGLU": (lambda: layers.SwiGLU(6), {"x": X}),
    "ZeroCenteredRMSNorm": (layers.ZeroCenteredRMSNorm, {"x": X}),
    "GatedRMSNorm": (layers.GatedRMSNorm, {"x": X, "gate": X}),
    "PartialRotaryEmbedding": (
        layers.PartialRotaryEmbedding,
        {"x": np.ones((2, 3, 2, 8), "float32"), "positions": SEGMENTS},
    ),
    "RoutedExperts": (
        lambda: layers.RoutedExperts(3, 4),
        {"x": X[0], "experts": np.zeros((3, 2), "int32"), "weights": np.ones((3, 2), "float32")},
    ),
    "ExpertRouter": (
        lambda: layers.ExpertRouter(4),
        {"encoded": X, "hidden": X, "prompt": MASK},
    ),
    "LayerRouter": (lambda: layers.LayerRouter(5), {"hidden": X, "prompt": MASK}),
    "HaltingUnit": (layers.HaltingUnit, {"hidden": X}),
    "LoRAExperts": (
        lambda: layers.LoRAExperts(3, 2, (5,)),
        {"x": X, "weights": np.ones((2, 3, 3), "float32")},
    ),
}
CACHED = ["GatedAttention", "GatedDeltaNet", "DecoderLayer", "ThinkLoop"]
NO_ARRAYS = ["text", object(), {"a": 1}, [[1], [1, 2]], 1j]


def not_fitting(array, free):
    """Arrays of other shapes and kinds than one; `free`: of any shape but for the last axis."""
    floats = array.dtype.kind == "f"
    yield from (array.astype(dtype) for dtype in ("O", "U", "complex64"))
    if array.dtype != "bool":
        yield array.astype("int32" if floats else "float32")
    if floats:
        yield from (array[..., :1], np.concatenate([array, array], axis=-1))
    if array.dtype == "int32":
        yield array.astype("int64") + 2**32
    if not free:
        yield from (array[None], array[0], array[:1], np.concatenate([array, array]))
        if array.ndim > 1:
            yield from (array[:, :1], array[:, :0])


def accepted(layer, arguments, names):
    """Mutants of the arguments of these names which the layer takes; others are refused by name."""
    if not layer.built:
        layer(**{n: keras.KerasTensor(x.shape, x.dtype) for n, x in arguments.items()})
    first, taken = next(iter(arguments)), []
    for name in names:
        free = name == first and len(arguments) == 1
        mutants = [*not_fitting(arguments[name], free), *NO_ARRAYS]
        for mutant in [*mutants, None] if name == first else mutants:
            try:
                layer(**{**arguments, name: mutant})
            except (TypeError, ValueError) as error:
                assert "Received: " in str(error), (name, mutant)
                assert any(f"`{n}`" in str(error) for n in arguments), (name, mutant)
            else:
                taken.append((name, mutant))
    return taken


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_a_call_is_refused_by_name(name):
    make, arguments = CALLS[name]
    taken = accepted(make(), arguments, arguments)
    if name == "PartialRotaryEmbedding":  # whose positions may be those of one row
        taken = [mutant for mutant in taken if np.shape(mutant[1]) != (1, 3)]
    if name == "LoRAExperts":  # whose weights may be those of all tokens of a row
        taken = [mutant for mutant in taken if np.shape(mutant[1]) != (2, 1, 3)]
    assert not taken


@pytest.mark.parametrize("name", CACHED)
def test_lengths_are_one_integer_per_row(name):
    layer = CALLS[name][0]()
    layer.build(X.shape)
    arguments = {**ROWS, "cache": layer.init_cache(2, 6), "lengths": LENGTHS}
    assert not accepted(layer, arguments, ["lengths"])


def test_a_flag_is_a_bool():
    with pytest.raises(ValueError, match="`return_routing` must be a bool"):
        moe()(X, return_routing="no")


def test_lists_are_arrays():
    layer = layers.SwiGLU(6)
    np.testing.assert_array_equal(np.asarray(layer(X.tolist())), np.asarray(layer(X)))
