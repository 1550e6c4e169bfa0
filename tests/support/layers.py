"""Layers with the weights of the published ones, and the functions of them that tests share.

new_layer(name)            a built layer with the dimensions of a fixture
load_published(layer, name)    the same with the fixture's weights
subject(name)              one such layer for all tests that do not change it
program(name, method)      a compiled method of `Subject`; one compilation per shape
"""

import dataclasses
import functools
import json

import numpy as np

from qwen3_next import layers
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.weight_table import weight_table
from tests.support.paths import FIXTURES as FOLDER
from tests.support.running import run, to_numpy, weight_arrays, with_weights

FIXTURES = np.load(FOLDER / "layers.npz")
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
# One Gated DeltaNet stands for all where the ratio of its heads makes no difference.
KINDS = [name for name in PLACES if name not in (DELTA_NETS[0], DELTA_NETS[2])]
ROWS, TOKENS, SPACE, WIDTH = 3, 12, 40, 24
SPREAD = [
    np.arange(SPACE - TOKENS, SPACE),
    np.arange(TOKENS),
    np.sort(np.random.default_rng(4).choice(SPACE, TOKENS, replace=False)),
]


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


def new_layer(name, dtype="float32", **options):
    config = config_of(name)
    if name in DELTA_NETS:
        layer = _delta_net(config, dtype=dtype)
    elif name == "attention":
        layer = _attention(config, dtype=dtype, **options)
    elif name == "sparse_moe":
        layer = _moe(config, dtype=dtype)
    elif name == "mlp":
        layer = layers.SwiGLU(config.shared_expert_intermediate_size, dtype=dtype)
    elif name == "rms_norm":
        layer = layers.ZeroCenteredRMSNorm(config.rms_norm_eps, dtype=dtype)
    elif name == "gated_rms_norm":
        layer = layers.GatedRMSNorm(config.rms_norm_eps, dtype=dtype)
    else:
        mixer = _delta_net if name == "decoder_layer_linear" else _attention
        parts = mixer(config, dtype=dtype), _moe(config, dtype=dtype)
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


def complete(layer, *inputs):
    """The output, and behind it the cache of a Gated DeltaNet."""
    if not isinstance(layer, layers.GatedDeltaNet):
        return (layer(*inputs),)
    output, cache = layer(*inputs, cache=layer.init_cache(inputs[0].shape[0]))
    return output, *cache


class Subject:
    """A layer with the published weights, and the functions that tests share."""

    def __init__(self, name):
        self.layer = load_published(new_layer(name), name)
        self.weights = weight_arrays(self.layer)
        self.of_weights = with_weights(self.layer, functools.partial(complete, self.layer))
        self.plain_of_weights = with_weights(self.layer, self.plain)

    def plain(self, *inputs):
        return self.layer(*inputs)

    def masked(self, x, mask, ids):
        return self.layer(x, padding_mask=mask, segment_ids=ids)

    def cached(self, x, mask, cache, lengths):
        cache = self.cache_type(*cache)
        output, cache, *_ = self.layer(x, padding_mask=mask, cache=cache, lengths=lengths)
        return output, tuple(cache)

    def replayed(self, x, cache, lengths, counts):
        """The output of a replayable pass and the cache with the first `counts` tokens of it."""
        cache = self.cache_type(*cache)
        output, update, *_ = self.layer(x, cache=cache, lengths=lengths, replayable=True)
        self.update_type = type(update)
        committed = self.layer.commit(cache, update, counts)
        assert type(committed) is self.cache_type
        return output, tuple(committed)

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


def _delta_net(config, **options):
    return layers.GatedDeltaNet(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        linear_conv_kernel_dim=config.linear_conv_kernel_dim,
        name="linear_attn",
        **options,
    )


def _attention(config, **options):
    return layers.GatedAttention(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        name="self_attn",
        **options,
    )


def _moe(config, **options):
    return layers.SparseMoE(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        name="mlp",
        **{"norm_topk_prob": config.norm_topk_prob, **options},
    )
