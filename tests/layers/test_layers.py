import dataclasses
import functools
import json
import math
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from qwen3_next import layers
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.layers.norms import make_norm
from qwen3_next.models.weight_table import weight_table
from tests.support import oracles
from tests.support.running import (
    assert_close,
    assert_slopes,
    gradients,
    run,
    to_numpy,
    to_tensors,
    weight_arrays,
    weight_gradients,
    with_weights,
)

FIXTURES = np.load(Path(__file__).parents[1] / "fixtures" / "layers.npz")
PLACES = {
    "gated_delta_net_ratio1": "layers_0/linear_attn",
    "gated_delta_net_ratio2": "layers_0/linear_attn",
    "gated_delta_net_ratio4": "layers_0/linear_attn",
    "attention": "layers_1/self_attn",
    "sparse_moe": "layers_0/mlp",
    "mlp": "layers_0/mlp/shared_expert",
    "rms_norm": "layers_0/input_layernorm",
    "gated_rms_norm": "layers_0/linear_attn/norm",
    "decoder_layer_linear": "layers_0",
    "decoder_layer_full": "layers_1",
}
DELTA_NETS = [name for name in PLACES if name.startswith("gated_delta_net")]
MIXERS = ["gated_delta_net_ratio2", "attention", "decoder_layer_linear", "decoder_layer_full"]
SERIALIZED = [name for name in PLACES if name not in (DELTA_NETS[0], DELTA_NETS[2])]
ROWS, TOKENS, SPACE, WIDTH = 3, 12, 40, 24


@pytest.fixture(autouse=True, scope="module")
def quickly_drawn_weights():
    """A backend's generator compiles a program a shape, and most tests replace the weights."""

    def draw(self, shape, dtype=None):
        values = np.random.default_rng(sum(shape)).normal(0.0, self.stddev, shape)
        return ops.cast(values.astype("float32"), dtype or "float32")

    with mock.patch.object(keras.initializers.RandomNormal, "__call__", draw):
        yield


def tolerance(name):
    return 3e-5 if name.startswith("gated_delta_net") else 1e-5


@functools.cache
def config_of(name):
    published = json.loads(str(FIXTURES[f"{name}/config"]))
    known = {field.name for field in dataclasses.fields(Qwen3NextConfig)}
    values = {k: v for k, v in published.items() if k in known}
    rope = published["rope_parameters"]
    return Qwen3NextConfig(
        num_layers=published["num_hidden_layers"],
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=rope["partial_rotary_factor"],
        **values,
    )


def delta_net(config, **options):
    return layers.GatedDeltaNet(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        linear_conv_kernel_dim=config.linear_conv_kernel_dim,
        name="linear_attn",
        **options,
    )


def attention(config, **options):
    return layers.GatedAttention(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        name="self_attn",
        **options,
    )


def mixture(config, **options):
    return layers.SparseMoE(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        name="mlp",
        **{"norm_topk_prob": config.norm_topk_prob, **options},
    )


def new_layer(name, dtype="float32", **options):
    config = config_of(name)
    if name in DELTA_NETS:
        layer = delta_net(config, dtype=dtype)
    elif name == "attention":
        layer = attention(config, dtype=dtype, **options)
    elif name == "sparse_moe":
        layer = mixture(config, dtype=dtype)
    elif name == "mlp":
        layer = layers.SwiGLU(config.shared_expert_intermediate_size, dtype=dtype)
    elif name == "rms_norm":
        layer = layers.ZeroCenteredRMSNorm(config.rms_norm_eps, dtype=dtype)
    elif name == "gated_rms_norm":
        layer = layers.GatedRMSNorm(config.rms_norm_eps, dtype=dtype)
    else:
        mixer = delta_net if name == "decoder_layer_linear" else attention
        parts = mixer(config, dtype=dtype), mixture(config, dtype=dtype)
        layer = layers.DecoderLayer(*parts, dtype=dtype, **options)
    layer.build(FIXTURES[f"{name}/in/hidden_states"].shape)
    return layer


def load_published(layer, name):
    base = f"model/{PLACES[name]}/"
    published = base.replace("/layers_", "/layers/").replace("/", ".")
    values = {}
    for row in weight_table(config_of(name)):
        if row.path.startswith(base):
            tensors = [f"{name}/weights/{t.removeprefix(published)}" for t in row.tensors]
            tensors = [FIXTURES[t].astype("float32") for t in tensors]
            values[row.path.removeprefix(base)] = row.layout.load(tensors)
    variables = {v.path.split("/", 1)[1]: v for v in layer.trainable_variables}
    assert set(variables) == set(values)
    for path, variable in variables.items():
        variable.assign(values[path])
    return layer


def inputs_of(name):
    arguments = ["hidden_states", "gate"] if name == "gated_rms_norm" else ["hidden_states"]
    return [FIXTURES[f"{name}/in/{argument}"].astype("float32") for argument in arguments]


def hidden(output):
    return output.hidden if isinstance(output, tuple) and hasattr(output, "hidden") else output


def complete(layer, *inputs):
    """The output, and behind it the state of a Gated DeltaNet."""
    if not isinstance(layer, layers.GatedDeltaNet):
        return (hidden(layer(*inputs)),)
    output, cache = layer(*inputs, cache=layer.init_cache(inputs[0].shape[0]))
    return output, *cache


class Subject:
    """A layer with the published weights, and the functions that the tests share."""

    def __init__(self, name):
        self.layer = load_published(new_layer(name), name)
        self.weights = weight_arrays(self.layer)
        self.of_weights = with_weights(self.layer, functools.partial(complete, self.layer))
        self.plain_of_weights = with_weights(self.layer, self.plain)

    def plain(self, *inputs):
        return hidden(self.layer(*inputs))

    def masked(self, x, mask, ids):
        return hidden(self.layer(x, padding_mask=mask, segment_ids=ids))

    def cached(self, x, mask, cache, lengths):
        cache = self.cache_type(*cache)
        uses_lengths = not isinstance(self.layer, layers.GatedDeltaNet)
        options = {"lengths": lengths} if uses_lengths else {}
        output, cache, *_ = self.layer(x, padding_mask=mask, cache=cache, **options)
        return output, tuple(cache)

    def empty_cache(self, capacity):
        cache = self.layer.init_cache(ROWS, capacity)
        self.cache_type = type(cache)
        return to_numpy(tuple(cache))


@functools.cache
def subject(name):
    return Subject(name)


@functools.cache
def program(name, method):
    return functools.partial(run, getattr(subject(name), method))


def tokens(seed=0):
    x = np.random.default_rng(seed).normal(size=(ROWS, TOKENS, WIDTH))
    return x.astype("float32")


def padded(x, spread):
    """The tokens of x in rows of SPACE, at the places of `spread`, with noise everywhere else."""
    mask = np.zeros((ROWS, SPACE), bool)
    for row, places in enumerate(spread):
        mask[row, places] = True
    noise = np.random.default_rng(8).normal(size=(ROWS, SPACE, x.shape[-1])).astype("float32")
    noise[mask] = x.reshape(-1, x.shape[-1])
    return noise, mask


SPREAD = [
    np.arange(SPACE - TOKENS, SPACE),
    np.arange(TOKENS),
    np.sort(np.random.default_rng(4).choice(SPACE, TOKENS, replace=False)),
]


@pytest.mark.parametrize("name", PLACES)
def test_layer_agrees_with_the_published_one(name):
    it = subject(name)
    output, *_ = run(it.of_weights, *it.weights, *inputs_of(name))
    assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


@pytest.mark.parametrize("name", PLACES)
def test_a_one_percent_error_in_any_weight_is_seen(name):
    it, rng = subject(name), np.random.default_rng(0)
    for place in range(len(it.weights)):
        wrong = list(it.weights)
        wrong[place] = wrong[place] * rng.choice([0.99, 1.01], wrong[place].shape).astype("float32")
        output, *_ = run(it.of_weights, *wrong, *inputs_of(name))
        with pytest.raises(AssertionError, match="off by"):
            assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


@pytest.mark.portable
@pytest.mark.parametrize("name", ["gated_delta_net_ratio2", "sparse_moe"])
def test_layer_agrees_in_every_mode(name, compiled):
    it = subject(name)
    output, *_ = run(it.of_weights, *it.weights, *inputs_of(name), mode=compiled)
    assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


def test_rotary_agrees_with_the_published_one():
    config = config_of("rotary")
    layer = layers.PartialRotaryEmbedding(config.rope_theta, config.partial_rotary_factor)
    positions = FIXTURES["rotary/in/position_ids"]
    for name in ("query", "key"):
        x = FIXTURES[f"rotary/in/{name}"].astype("float32")
        assert_close(run(layer, x, positions), FIXTURES[f"rotary/out/{name}"], 1e-5)


@pytest.mark.portable
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_rotary_matches_the_oracle(factor):
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 16)).astype("float32")
    positions = np.array([[0, 1, 2, 3, 4, 5], [900, 7, 7, 0, 30, 2]], "int32")
    layer = layers.PartialRotaryEmbedding(1e4, factor)
    expected = oracles.rotary(x, positions, 1e4, factor)
    assert_close(run(layer, x, positions), expected, 5e-5)


@pytest.mark.parametrize("name", DELTA_NETS)
def test_delta_net_leaves_the_published_state(name):
    it, config = subject(name), config_of(name)
    _, conv, recurrent = run(it.of_weights, *it.weights, *inputs_of(name))
    assert_close(recurrent, FIXTURES[f"{name}/out/recurrent_state"], 3e-5)
    channels = FIXTURES[f"{name}/out/conv_state"][0][:, None, 1:]
    layout = next(row.layout for row in weight_table(config) if row.path.endswith("conv1d"))
    assert_close(conv[0], layout.load([channels]).reshape(conv.shape[1:]), 1e-5)


def test_routing_agrees_with_the_published_one():
    x = inputs_of("sparse_moe")[0]
    layer = subject("sparse_moe").layer
    _, routing = run(lambda x: layer(x, return_routing=True), x)
    logits = FIXTURES["sparse_moe/out/router_logits"].astype("float64")
    chosen = FIXTURES["sparse_moe/out/chosen"]
    assert routing[0].tolist() == np.bincount(chosen.ravel(), minlength=8).tolist()
    assert_close(routing[1], oracles._softmax(logits).sum(0), 1e-5)
    assert routing[2] == 12


@pytest.mark.parametrize("name", SERIALIZED)
def test_a_layer_survives_serialization(name):
    it = subject(name)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(it.layer)))
    clone = keras.saving.deserialize_keras_object(config)
    assert [v.shape for v in clone.weights] == [v.shape for v in it.layer.weights]
    function = with_weights(clone, functools.partial(complete, clone))
    arrays = [*it.weights, *inputs_of(name)]
    assert np.array_equal(run(function, *arrays)[0], run(it.of_weights, *arrays)[0])


@pytest.mark.parametrize(
    "layer",
    [
        (layers.ZeroCenteredRMSNorm, {"epsilon": 1e-3}),
        (layers.GatedRMSNorm, {"epsilon": 1e-3}),
        (layers.PartialRotaryEmbedding, {"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        (
            layers.SwiGLU,
            {"intermediate_size": 3, "ffn_type": "geglu", "initializer_range": 0.5},
        ),
        (
            layers.RoutedExperts,
            {
                "num_experts": 3,
                "moe_intermediate_size": 5,
                "ffn_type": "geglu",
                "initializer_range": 0.5,
            },
        ),
        (
            layers.SparseMoE,
            {
                "num_experts": 3,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 5,
                "shared_expert_intermediate_size": 7,
                "norm_topk_prob": False,
                "ffn_type": "geglu",
                "initializer_range": 0.5,
            },
        ),
        (
            layers.GatedAttention,
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "output_gate": False,
                "partial_rotary_factor": 0.5,
                "rope_theta": 5.0,
                "normalization_type": "rms_norm",
                "rms_norm_eps": 1e-3,
                "attention_dropout": 0.5,
                "initializer_range": 0.5,
            },
        ),
        (
            layers.GatedDeltaNet,
            {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 6,
                "linear_value_head_dim": 8,
                "linear_conv_kernel_dim": 3,
                "rms_norm_eps": 1e-3,
                "initializer_range": 0.5,
            },
        ),
        (
            layers.DecoderLayer,
            {
                "mixer": layers.GatedAttention(4, 2, 8),
                "mlp": layers.SwiGLU(3),
                "normalization_type": "rms_norm",
                "rms_norm_eps": 1e-3,
                "dropout": 0.5,
                "gradient_checkpointing": True,
            },
        ),
    ],
    ids=lambda layer: layer[0].__name__,
)
def test_config_holds_every_argument(layer):
    cls, arguments = layer
    made = cls(**arguments, dtype="mixed_bfloat16", name="given")
    config = made.get_config()
    names = set(cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount])
    assert set(arguments) == names
    for name, value in arguments.items():
        if not isinstance(value, keras.layers.Layer):
            assert config[name] == value
    assert cls.from_config(config).get_config() == config


@pytest.mark.parametrize("name", MIXERS)
def test_padding_anywhere_does_not_change_real_tokens(name):
    x = tokens()
    noisy, mask = padded(x, SPREAD)
    output = program(name, "masked")(noisy, mask, np.zeros(mask.shape, "int32"))
    assert np.isfinite(output).all()
    expected = program(name, "plain")(x)
    assert_close(output[mask].reshape(expected.shape), expected, 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_equal_separate_ones(name):
    x = tokens()
    rng = np.random.default_rng(3)
    orders = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    spread = [np.sort(rng.choice(SPACE, 3 * TOKENS, replace=False)) for _ in range(ROWS)]
    rows = np.concatenate([x[order].reshape(1, -1, WIDTH) for order in orders])
    noisy, mask = padded(rows, spread)
    ids = rng.integers(0, 3, mask.shape).astype("int32")
    ids[mask] = np.repeat(np.ravel(orders), TOKENS)
    output = program(name, "masked")(noisy, mask, ids)
    expected = program(name, "plain")(x)[np.ravel(orders)]
    assert_close(output[mask].reshape(expected.shape), expected, 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_slot_in_one_piece_equals_no_slot(name):
    x = tokens()
    mask = np.ones(x.shape[:2], bool)
    start = np.zeros(ROWS, "int32")
    cache = subject(name).empty_cache(TOKENS + 2)
    output, _ = program(name, "cached")(x, mask, cache, start)
    assert_close(output, program(name, "plain")(x), 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_slot_in_ragged_pieces_equals_no_slot(name):
    x = tokens()
    counts = [[5, 0, 6, 1], [2, 8, 1, 1], [4, 4, 3, 0]]
    expected = program(name, "plain")(x)
    rng = np.random.default_rng(6)
    cache = subject(name).empty_cache(TOKENS + 2)
    lengths = np.zeros(ROWS, "int32")
    for piece in range(4):
        space = 1 if piece == 3 else TOKENS
        chunk = rng.normal(size=(ROWS, space, WIDTH)).astype("float32")
        mask = np.zeros((ROWS, space), bool)
        for row in range(ROWS):
            count = counts[row][piece]
            places = np.sort(rng.choice(space, count, replace=False))
            mask[row, places] = True
            chunk[row, places] = x[row, lengths[row] : lengths[row] + count]
        output, cache = program(name, "cached")(chunk, mask, cache, lengths)
        for row in range(ROWS):
            seen = slice(lengths[row], lengths[row] + counts[row][piece])
            assert_close(output[row][mask[row]], expected[row, seen], 1e-5)
        lengths = lengths + mask.sum(1).astype("int32")
    assert lengths.tolist() == [12, 12, 11]


@pytest.mark.parametrize("name", MIXERS)
def test_rows_and_later_tokens_do_not_reach_a_token(name):
    x = tokens()
    output = program(name, "plain")(x)
    changed = x.copy()
    changed[0] += 1.0
    changed[1:, -1] += 1.0
    other = program(name, "plain")(changed)
    assert_close(other[1:, :-1], output[1:, :-1], 1e-6)
    assert np.abs(other[1:, -1] - output[1:, -1]).max() > 1e-2


@pytest.mark.parametrize("name", ["decoder_layer_linear", "attention"])
def test_padding_does_not_change_the_gradients(name):
    it, x = subject(name), tokens()
    noisy, mask = padded(x, SPREAD)
    pull = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    wide_pull = np.zeros(noisy.shape, "float32")
    wide_pull[mask] = pull.reshape(-1, WIDTH)
    expected = gradients(it.plain_of_weights, [*it.weights, x], pull)
    arrays = [*it.weights, noisy, mask, None]
    grads = gradients(with_weights(it.layer, it.masked), arrays, wide_pull)
    for grad, want in zip(grads[: len(it.weights)], expected, strict=False):
        size = max(1.0, np.abs(want).max())
        assert_close(grad / size, want / size, 1e-5)
    d_noisy = grads[len(it.weights)]
    assert_close(d_noisy[mask].reshape(x.shape), expected[-1], 1e-5)
    assert not d_noisy[~mask].any()


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


def test_residual_dropout_changes_training_only():
    name = "decoder_layer_full"
    dropped = load_published(new_layer(name, dropout=0.5), name)
    expected = program(name, "plain")(tokens())

    def both(x):
        return dropped(x, training=False).hidden, dropped(x, training=True).hidden

    calm, trained = run(with_weights(dropped, both), *weight_arrays(dropped), tokens())
    assert_close(calm, expected, 1e-5)
    assert np.abs(trained - expected).max() > 1e-2


def test_gradient_checkpointing_changes_no_gradient():
    name, x = "decoder_layer_linear", tokens()
    pull = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    it = subject(name)
    expected = gradients(it.plain_of_weights, [*it.weights, x], pull)[:-1]
    layer = load_published(new_layer(name, gradient_checkpointing=True), name)
    grads = weight_gradients(layer, lambda x: layer(x, training=True).hidden, x, pull)
    for grad, want in zip(grads, expected, strict=True):
        size = max(1.0, np.abs(want).max())
        assert_close(grad / size, want / size, 1e-6)


def test_capacity_of_a_slot_is_never_overrun():
    name, x = "attention", tokens()
    mask = np.ones(x.shape[:2], bool)
    cache = subject(name).empty_cache(TOKENS + 2)
    lengths = np.array([0, 2, 13], "int32")
    _, (keys, _) = program(name, "cached")(x, mask, cache, lengths)
    assert keys[0, :TOKENS].any(axis=(1, 2)).all()
    assert not keys[0, TOKENS:].any()
    assert not keys[1, :2].any()
    assert not keys[2, :13].any()


def test_a_slot_needs_lengths_and_takes_no_segments():
    layer = subject("attention").layer
    x = ops.convert_to_tensor(tokens())
    cache = layer.init_cache(ROWS, TOKENS)
    with pytest.raises(ValueError, match=r"lengths.*Received"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"segment_ids.*Received"):
        ids, lengths = ops.zeros((ROWS, TOKENS), "int32"), ops.zeros((ROWS,), "int32")
        layer(x, cache=cache, lengths=lengths, segment_ids=ids)


MIXTURES = {
    "top 1": (1, False, 0),
    "top 1 normed": (1, True, 0),
    "top 2": (2, False, 6),
    "top 2 normed": (2, True, 6),
    "all": (8, True, 0),
}
X = tokens()[:2, :6]
MASK = np.array([[0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], bool)


@functools.cache
def mixture_of(case):
    top_k, normed, shared = MIXTURES[case]
    layer = layers.SparseMoE(8, top_k, 5, shared, norm_topk_prob=normed, initializer_range=0.4)
    layer.build(X.shape)
    return layer


def moe_oracle(case):
    top_k, normed, _ = MIXTURES[case]

    def function(router, gate_up, down, *rest):
        *shared, x = rest
        x = np.float64(x).reshape(-1, WIDTH)
        return oracles.sparse_moe(x, router, gate_up, down, top_k, normed, shared or None)

    return function


@pytest.mark.parametrize("case", MIXTURES)
def test_mixture_matches_the_oracle(case):
    layer = mixture_of(case)
    output, probabilities, chosen = moe_oracle(case)(*weight_arrays(layer), X)
    found, routing = run(functools.partial(layer, return_routing=True), X)
    assert_close(found, output.reshape(X.shape), 1e-5)
    assert_close(routing[0], np.bincount(chosen.ravel(), minlength=8), 0)
    assert_close(routing[1], probabilities.sum(0), 1e-5)
    assert routing[2] == 12


@pytest.mark.parametrize("case", ["top 1", "top 1 normed", "top 2 normed"])
def test_gradients_reach_the_router_and_the_experts_in_use_only(case):
    layer = mixture_of(case)
    arrays = [*weight_arrays(layer), X]
    pull = np.random.default_rng(1).normal(size=X.shape).astype("float32")
    grads = gradients(with_weights(layer), arrays, pull)
    if case != "top 1 normed":
        flat_pull = pull.reshape(-1, WIDTH)
        assert_slopes(
            lambda *arrays: moe_oracle(case)(*arrays)[0],
            arrays,
            flat_pull,
            [*grads[:-1], None] if case == "top 1" else grads,
        )
    assert np.abs(grads[0]).max() > 1e-3
    chosen = moe_oracle(case)(*arrays)[2]
    unused = np.setdiff1d(np.arange(8), chosen)
    assert not grads[1][unused].any()
    assert not grads[2][unused].any()
    assert grads[1][np.unique(chosen)].any(axis=(1, 2)).all()


def test_the_router_of_a_normed_top_1_learns_as_if_the_sum_were_constant():
    layer = mixture_of("top 1 normed")
    arrays = [*weight_arrays(layer), X]
    pull = np.random.default_rng(1).normal(size=X.shape).astype("float32")
    grads = gradients(with_weights(layer), arrays, pull)
    constant = moe_oracle("top 1")(*arrays)[1].max(-1, keepdims=True)

    def surrogate(*arrays):
        return moe_oracle("top 1")(*arrays)[0] / constant

    assert_slopes(surrogate, arrays, pull.reshape(-1, WIDTH), [grads[0]])


def test_padding_is_routed_nowhere():
    layer = mixture_of("top 2")
    noisy = X.copy()
    noisy[~MASK] = 50.0

    def routed(x, mask):
        return layer(x, padding_mask=mask, return_routing=True)

    output, (load, probability, count) = run(routed, noisy, MASK)
    expected, probabilities, chosen = moe_oracle("top 2")(*weight_arrays(layer), X)
    real = MASK.ravel()
    assert_close(output[MASK], expected[real], 1e-5)
    assert load.tolist() == np.bincount(chosen[real].ravel(), minlength=8).tolist()
    assert_close(probability, probabilities[real].sum(0), 1e-5)
    assert count == real.sum()
    assert load.sum() == 2 * real.sum()

    *_, (load, probability, count) = run(routed, noisy, np.zeros_like(MASK))
    assert not load.any() and not probability.any() and count == 0


def test_load_balancing_loss_matches_the_oracle():
    rng = np.random.default_rng(0)
    probabilities = [rng.dirichlet(np.ones(8), 12) for _ in range(2)]
    chosen = [np.argsort(-p, axis=1)[:, :2] for p in probabilities]
    real = MASK.ravel()
    routings = [
        layers.Routing(
            np.bincount(c[real].ravel(), minlength=8).astype("float32"),
            p[real].sum(0).astype("float32"),
            np.float32(real.sum()),
        )
        for p, c in zip(probabilities, chosen, strict=True)
    ]
    loss = run(lambda *r: layers.load_balancing_loss(r), *routings)
    assert_close(loss, oracles.load_balancing_loss(probabilities, chosen, MASK), 1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_balanced_router_has_the_smallest_loss(top_k):
    def loss(load, probability):
        load, probability = np.float32(load), np.float32(probability)
        routing = layers.Routing(load, probability, np.float32(16))
        return float(to_numpy(layers.load_balancing_loss([to_tensors(routing)])))

    even = np.full(8, 2.0)
    assert loss(top_k * even, even) == pytest.approx(top_k)
    skewed = np.array([4, 4, 3, 1, 1, 1, 1, 1])
    assert loss(top_k * skewed, skewed) > top_k + 0.1
    assert loss(np.zeros(8), np.zeros(8)) == 0


def test_the_load_carries_no_gradient():
    load, probability = np.full(8, 3.0, "float32"), np.full(8, 1.5, "float32")

    def loss(load, probability):
        return layers.load_balancing_loss([layers.Routing(load, probability, ops.ones(()))])

    grads = gradients(lambda p: loss(ops.convert_to_tensor(load), p), [probability], np.float32(1))
    assert_close(grads[0], 8 * load, 1e-6)


class Half:
    """A layer in mixed precision as a function of its weights, with all it can return."""

    def __init__(self, name):
        self.layer = load_published(new_layer(name, "mixed_bfloat16"), name)
        self.weights = weight_arrays(self.layer)
        self.function = with_weights(self.layer, self.call)

    def call(self, *inputs):
        layer, options = self.layer, {}
        if isinstance(layer, layers.GatedDeltaNet | layers.DecoderLayer):
            options["cache"] = layer.init_cache(inputs[0].shape[0], inputs[0].shape[1])
        if isinstance(layer, layers.SparseMoE):
            options["return_routing"] = True
        outputs = layer(*inputs, **options)
        outputs = tuple(outputs) if isinstance(outputs, tuple) else (outputs,)
        self.dtypes = keras.tree.map_structure(lambda x: standardize_dtype(x.dtype), outputs)
        return outputs

    def moved(self, path, name):
        """What a change of a weight too small for bfloat16 does to the outputs."""
        place = [v.path.endswith(path) for v in self.layer.trainable_variables].index(True)
        outputs = []
        for factor in (1.0, 1.0001):
            exact = to_numpy(ops.cast(self.weights[place], "bfloat16"))
            weights = list(self.weights)
            weights[place] = exact * np.float32(factor)
            assert np.array_equal(to_numpy(ops.cast(weights[place], "bfloat16")), exact)
            outputs.append(run(self.function, *weights, *inputs_of(name)))
        return keras.tree.map_structure(lambda a, b: np.abs(a - b).max(), *outputs)


half = functools.cache(Half)


@pytest.mark.parametrize("name", [name for name in SERIALIZED if name != "decoder_layer_full"])
def test_mixed_precision_runs_and_stays_near(name):
    it = half(name)
    output, *_ = run(it.function, *it.weights, *inputs_of(name))
    assert it.dtypes[0] == "bfloat16"
    expected = FIXTURES[f"{name}/out/hidden_states"]
    assert np.linalg.norm(output - expected) < 3e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("weight", ["A_log", "dt_bias"])
@pytest.mark.parametrize("name", ["gated_delta_net_ratio2", "decoder_layer_linear"])
def test_decay_rates_and_states_are_float32_in_mixed_precision(name, weight):
    _, cache, *_ = half(name).moved(weight, name)
    assert cache[1] > 1e-6
    assert half(name).dtypes[1] == ("bfloat16", "float32")


@pytest.mark.parametrize("name", ["sparse_moe", "decoder_layer_linear"])
def test_the_router_is_float32_in_mixed_precision(name):
    *_, routing = half(name).moved("gate/kernel", name)
    assert routing[1] > 1e-6
    assert set(half(name).dtypes[-1]) == {"float32"}


def test_islands_are_float32_variables_under_a_bfloat16_policy():
    delta = new_layer("gated_delta_net_ratio2", "bfloat16")
    moe = new_layer("sparse_moe", "bfloat16")
    assert {v.dtype for v in (delta.A_log, delta.dt_bias, moe.gate.kernel)} == {"float32"}
    assert {delta.in_proj_ba.kernel.dtype, moe.experts.down.dtype} == {"bfloat16"}


def test_initial_decay_rates_are_log_uniform():
    keras.utils.set_random_seed(0)
    layer = layers.GatedDeltaNet(1, 2000, 2, 2)
    layer.build((None, None, 4))
    rates = np.exp(to_numpy(layer.A_log.value))
    assert 0.01 <= rates.min() and rates.max() <= 16
    assert abs(rates.mean() - 8) < 0.5


@pytest.mark.parametrize(
    "names, make",
    [
        (["linear_num_value_heads"], lambda: layers.GatedDeltaNet(2, 3, 4, 4)),
        (["num_attention_heads", "num_key_value_heads"], lambda: layers.GatedAttention(3, 2, 8)),
        (["partial_rotary_factor"], lambda: layers.GatedAttention(2, 2, 6, True, 0.5)),
        (["partial_rotary_factor"], lambda: layers.GatedAttention(2, 2, 8, True, 1.5)),
        (["num_experts_per_tok", "num_experts"], lambda: layers.SparseMoE(4, 5, 8)),
        (["num_experts_per_tok"], lambda: layers.SparseMoE(4, 0, 8)),
        (["ffn_type"], lambda: layers.SwiGLU(4, ffn_type="relu")),
        (["ffn_type"], lambda: layers.RoutedExperts(4, 4, ffn_type="relu")),
        (["normalization_type"], lambda: make_norm("layer_norm", 1e-6, "norm", "float32")),
    ],
)
def test_an_error_names_the_argument_and_the_value(names, make):
    with pytest.raises(ValueError, match=f"`{names[0]}|{names[0]}`") as error:
        make()
    assert all(f"{name}=" in str(error.value) for name in names)


@pytest.mark.parametrize("ffn_type", ["swiglu", "geglu"])
def test_the_gated_network_uses_its_activation(ffn_type):
    layer = layers.SwiGLU(7, ffn_type, initializer_range=0.4)
    layer.build(X.shape)
    gate, up, down = (to_numpy(w.value).astype("float64") for w in layer.trainable_variables)
    gated = X @ gate
    if ffn_type == "swiglu":
        active = gated / (1 + np.exp(-gated))
    else:
        active = gated * 0.5 * (1 + np.vectorize(math.erf)(gated / 2**0.5))
    assert_close(run(layer, X), (active * (X @ up)) @ down, 1e-5)
