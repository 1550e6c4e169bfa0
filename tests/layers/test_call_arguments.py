"""What layers and ops are called with: masks of any dtype, batches without rows or tokens."""

import functools

import numpy as np
import pytest

from qwen3_next import layers
from qwen3_next.layers import ops
from tests.support.running import BACKEND, CHEAPEST, gradients, run
from tests.support.small_models import ONE_LAYER, small

REAL = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
MASKS = {
    "int": REAL,
    "twos": 2 * REAL,
    "uint8": (255 * REAL).astype("uint8"),
    "float": 0.5 * REAL,
    "list": REAL.tolist(),
}


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


X, KERNEL = normal(2, 5, 8), normal(3, 8)
QUERY, KEY = normal(2, 5, 2, 4), normal(2, 5, 1, 4)
RULE = KEY, KEY, QUERY, -np.abs(normal(2, 5, 2)), np.abs(normal(2, 5, 2))
SEGMENTS = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])


def attended(query, key, key_mask=None):
    return ops.attention(query, key, key, key_mask=key_mask)


def convolved(x, padding_mask=None, segment_ids=None):
    return ops.causal_conv1d(x, KERNEL, padding_mask=padding_mask, segment_ids=segment_ids)[0]


def by_rule(*inputs, padding_mask=None, implementation="chunked"):
    options = {"padding_mask": padding_mask, "implementation": implementation}
    return ops.gated_delta_rule(*inputs, chunk_size=2, **options)[0]


def replayable(*inputs, padding_mask=None):
    state = np.zeros((len(inputs[0]), 2, 4, 4), "float32")
    return ops.gated_delta_rule_with_replay(*inputs, state=state, padding_mask=padding_mask)[0]


@functools.cache
def one_layer():
    return small(**ONE_LAYER)


def attention_layer():
    return layers.GatedAttention(2, 1, 8)


@functools.cache
def built_attention():
    layer = attention_layer()
    layer.build(X.shape)
    return layer


def decoder_layer():
    return layers.DecoderLayer(attention_layer(), layers.SparseMoE(3, 2, 4))


def with_cache(layer, x, mask):
    cache, lengths = layer.init_cache(len(x), 6), np.zeros(len(x), "int32")
    return layer(x, cache=cache, lengths=lengths, padding_mask=mask)[0]


READS_A_MASK = {
    "attention": lambda mask: attended(QUERY, KEY, mask),
    "causal_conv1d": lambda mask: convolved(X, mask),
    "causal_conv1d, packed": lambda mask: convolved(X, mask, SEGMENTS),
    "gated_delta_rule": lambda mask: by_rule(*RULE, padding_mask=mask),
    "gated_delta_rule_with_replay": lambda mask: replayable(*RULE, padding_mask=mask),
    "GatedAttention": (attention_layer, lambda layer, mask: layer(X, padding_mask=mask)),
    "GatedAttention, packed": (
        attention_layer,
        lambda layer, mask: layer(X, padding_mask=mask, segment_ids=SEGMENTS),
    ),
    "GatedAttention, cached": (attention_layer, lambda layer, mask: with_cache(layer, X, mask)),
    "GatedAttention.heads": (attention_layer, lambda layer, mask: layer.heads(X, mask)[0]),
    "GatedDeltaNet": (
        lambda: layers.GatedDeltaNet(1, 2, 4, 4),
        lambda layer, mask: layer(X, padding_mask=mask),
    ),
    "SparseMoE": (
        lambda: layers.SparseMoE(3, 2, 4),
        lambda layer, mask: layer(X, padding_mask=mask, return_routing=True)[1].tokens_per_expert,
    ),
    "DecoderLayer": (decoder_layer, lambda layer, mask: layer(X, padding_mask=mask)),
    "DecoderLayer, updates": (decoder_layer, lambda layer, mask: layer(X, updates=mask)),
    "ThinkLoop": (
        lambda: layers.ThinkLoop([decoder_layer()], 2, layers.HaltingUnit(), "sequence"),
        lambda layer, mask: layer(X, padding_mask=mask),
    ),
    "ExpertRouter": (
        lambda: layers.ExpertRouter(2),
        lambda layer, mask: layer(X, X, prompt=mask),
    ),
}


@pytest.mark.parametrize("name", READS_A_MASK)
def test_a_mask_of_any_dtype_is_what_is_not_0(name):
    call = READS_A_MASK[name]
    if isinstance(call, tuple):
        make, of_layer = call
        layer = make()
        layer.build(X.shape)

        def call(mask):
            return of_layer(layer, mask)

    masks = {"bool": REAL.astype(bool), **MASKS}
    found = run(lambda: {kind: call(mask) for kind, mask in masks.items()}, mode=CHEAPEST)
    for kind in MASKS:
        assert np.array_equal(found[kind], found["bool"]), kind


NO_ROWS = {
    "attention": lambda: attended(QUERY[:0], KEY[:0], REAL[:0]),
    "causal_conv1d": lambda: convolved(X[:0], REAL[:0], SEGMENTS[:0]),
    "chunked": lambda: by_rule(*(x[:0] for x in RULE)),
    "chunk_parallel": lambda: by_rule(*(x[:0] for x in RULE), implementation="chunk_parallel"),
    "recurrent": lambda: by_rule(*(x[:0] for x in RULE), implementation="recurrent"),
    "replay": lambda: replayable(*(x[:0] for x in RULE)),
    "GatedAttention": lambda: built_attention()(X[:0], padding_mask=REAL[:0]),
    "model": lambda: one_layer()(np.zeros((0, 5), "int32")),
}
if BACKEND == "jax":
    NO_ROWS["pallas"] = lambda: by_rule(*(x[:0] for x in RULE), implementation="pallas")


@pytest.mark.parametrize("name", NO_ROWS)
def test_a_batch_without_rows_has_an_empty_output(name):
    one_layer(), built_attention()  # made outside of programs
    assert run(NO_ROWS[name], mode=CHEAPEST).shape[:2] == (0, 5)


@pytest.mark.parametrize("function, arrays", [(attended, (QUERY, KEY)), (by_rule, RULE)])
def test_a_batch_without_rows_has_empty_gradients(function, arrays):
    arrays = [x[:0] for x in arrays]
    found = gradients(function, arrays, np.zeros((0, 5, 2, 4), "float32"))
    assert [x.shape for x in found] == [x.shape for x in arrays]


@pytest.mark.parametrize(
    "argument, call",
    [
        ("query", lambda: attended(QUERY[:, :0], KEY[:, :0])),
        ("key", lambda: ops.attention(QUERY, KEY[:, :0], KEY[:, :0], limits=REAL)),
        ("inputs", lambda: convolved(X[:, :0])),
        ("inputs", lambda: convolved(X[:, :0], segment_ids=SEGMENTS[:, :0])),
        ("value", lambda: by_rule(*(x[:, :0] for x in RULE))),
        ("value", lambda: by_rule(*(x[:, :0] for x in RULE), implementation="recurrent")),
        ("value", lambda: replayable(*(x[:, :0] for x in RULE))),
        ("query", lambda: attention_layer()(X[:, :0])),
        ("inputs", lambda: layers.GatedDeltaNet(1, 2, 4, 4)(X[:, :0])),
    ],
)
def test_rows_without_tokens_are_refused(argument, call):
    with pytest.raises(ValueError, match=f"`{argument}` must hold at least one token per row"):
        call()


def test_feed_forward_layers_take_rows_without_tokens():
    layer = layers.SparseMoE(3, 2, 4)
    layer.build(X.shape)
    output, routing = run(lambda x: layer(x, return_routing=True), X[:, :0], mode=CHEAPEST)
    assert output.shape == (2, 0, 8)
    assert routing.tokens_per_expert.sum() == 0.0
