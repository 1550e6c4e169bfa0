"""Gated attention: its maths, its dropout, its cache and what a replayable pass leaves."""

import functools

import numpy as np

from qwen3_next import layers
from tests.support import oracles
from tests.support.layers import ROWS, TOKENS, load_published, new_layer, program, subject, tokens
from tests.support.running import assert_close, run, to_numpy, weight_arrays, with_weights


def test_attention_without_a_gate_matches_the_oracle():
    layer = layers.GatedAttention(
        4,
        2,
        8,
        output_gate=False,
        partial_rotary_factor=1.0,
        normalization_type="rms_norm",
        initializer_range=0.3,
    )
    x = tokens()
    layer.build(x.shape)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    q, k, v, o = (to_numpy(projection.kernel.value) for projection in projections)
    positions = np.broadcast_to(np.arange(TOKENS), x.shape[:2])
    q, k, v = (np.einsum("btd,dhk->bthk", np.float64(x), p) for p in (q, k, v))
    q, k = (oracles.rotary(oracles.rms_norm(p, 1.0, 1e-6), positions, 1e4) for p in (q, k))
    mixed = oracles.causal_attention(q, k, v)
    assert_close(run(layer, x), np.einsum("bthk,hkd->btd", mixed, o), 1e-5)


def test_attention_dropout_changes_training_only():
    dropped = load_published(new_layer("attention", attention_dropout=0.5), "attention")
    expected = program("attention", "plain")(tokens())
    assert_close(run(functools.partial(dropped, training=False), tokens()), expected, 1e-5)

    def train(x, seed):
        return dropped(x, dropout_seed=seed, training=True)

    seeds = np.array([[0, 1], [0, 2], [0, 1]], "uint32")
    first, second, again = (run(train, tokens(), seed) for seed in seeds)
    assert np.abs(first - expected).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2
    assert np.array_equal(first, again)


def test_a_vanishing_attention_dropout_changes_nothing():
    barely = load_published(new_layer("attention", attention_dropout=1e-9), "attention")
    expected = program("attention", "plain")(tokens())
    function = with_weights(barely, functools.partial(barely, training=True))
    assert_close(run(function, *weight_arrays(barely), tokens()), expected, 1e-5)


def test_a_dropout_seed_is_drawn_where_something_is_dropped():
    dropped = new_layer("attention", attention_dropout=0.5)
    first, second = (to_numpy(dropped.draw_dropout_seed(training=True)) for _ in range(2))
    assert not np.array_equal(first, second)
    assert dropped.draw_dropout_seed(training=False) is None
    assert subject("attention").layer.draw_dropout_seed(training=True) is None
    assert subject("gated_delta_net_ratio2").layer.draw_dropout_seed(training=True) is None


def test_capacity_of_a_cache_is_never_overrun():
    name, x = "attention", tokens()
    mask = np.ones(x.shape[:2], bool)
    cache = subject(name).empty_cache(TOKENS + 2)
    lengths = np.array([0, 2, 13], "int32")
    _, (keys, _) = program(name, "cached")(x, mask, cache, lengths)
    assert keys[0, :TOKENS].any(axis=(1, 2)).all()
    assert not keys[0, TOKENS:].any()
    assert not keys[1, :2].any()
    assert not keys[2, :13].any()


def test_an_update_is_no_cache_until_it_is_committed():
    name, x = "attention", tokens()
    cache, lengths = subject(name).empty_cache(TOKENS + 2), np.zeros(ROWS, "int32")
    _, committed = program(name, "replayed")(x, cache, lengths, np.full(ROWS, TOKENS, "int32"))
    assert subject(name).update_type is layers.AttentionUpdate
    assert not issubclass(layers.AttentionUpdate, layers.AttentionCache)
    _, extended = program(name, "cached")(x, np.ones((ROWS, TOKENS), bool), cache, lengths)
    for buffer, expected in zip(committed, extended, strict=True):
        assert np.array_equal(buffer, expected)
