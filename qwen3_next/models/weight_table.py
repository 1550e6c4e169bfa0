"""Every weight of a model, declared once from its configuration.

One row a variable: where it lives in the model, its shape, the part of the model it belongs to, and
the published tensors it is made of. Parameter counts, import and export all read this table; a test
holds it against the variables of built models.
"""

from typing import NamedTuple

import numpy as np

PARTS = (
    "embedding",
    "deltanet",
    "attention",
    "router",
    "experts",
    "shared_expert",
    "mlp",
    "norm",
    "head",
    "mtp",
)


class Layout(NamedTuple):
    """How published tensors make up a variable: `load(tensors) -> array` and back by `save`."""

    load: object
    save: object


class Weight(NamedTuple):
    """One variable.

    `path` is relative to the model, `shape` is the variable's, `tensors` names the published
    tensors and `tensor_shape` is the shape of each of them. `fused` names the one tensor that some
    checkpoints hold instead of one an expert, with its own layout, or is `None`.
    """

    path: str
    shape: tuple
    part: str
    tensors: tuple
    tensor_shape: tuple
    layout: Layout
    fused: tuple | None = None

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def float32(self):
        """Whether the variable is float32 under every dtype policy."""
        return self.path.endswith(("/A_log", "/dt_bias", "score/kernel")) or self.part == "router"


def weight_table(config, num_labels=None):
    """All weights of a language model, or with `num_labels` of a classifier, in model order."""
    width, vocab = config.hidden_size, config.vocab_size
    rows = [_plain("model/embed_tokens/embeddings", (vocab, width), "embedding")]
    for index in range(config.num_layers):
        rows += _layer(config, index)
    rows.append(_norm(config, "model/norm", width))
    if num_labels is not None:
        rows.append(_dense("score", width, num_labels, "head"))
    elif not config.tie_word_embeddings:
        rows.append(_dense("lm_head", width, vocab, "head"))
    if num_labels is None and config.mtp is not None:
        for number in range(config.mtp.modules):
            rows += _mtp(config, mtp_name(number))
    return rows


def mtp_name(number):
    """Name of a module for multi-token prediction; the first has the published one."""
    return "mtp" if number == 0 else f"mtp_{number}"


def _layer(config, index):
    kind, is_moe = config.layer_types[index], config.is_moe(index)
    return _decoder_layer(config, f"model/layers_{index}", kind, is_moe)


def _decoder_layer(config, base, kind, is_moe):
    width = config.hidden_size
    rows = [_norm(config, f"{base}/input_layernorm", width)]
    if kind == "linear_attention":
        rows += _deltanet(config, f"{base}/linear_attn")
    else:
        rows += _attention(config, f"{base}/self_attn")
    rows.append(_norm(config, f"{base}/post_attention_layernorm", width))
    if is_moe:
        return rows + _mixture(config, f"{base}/mlp")
    return rows + _feed_forward(f"{base}/mlp", width, config.intermediate_size, "mlp")


def _mtp(config, base):
    width, kind = config.hidden_size, config.mtp.mtp_head_type
    rows = [
        _dense(f"{base}/fc", 2 * width, width, "mtp"),
        _norm(config, f"{base}/pre_fc_norm_embedding", width),
        _norm(config, f"{base}/pre_fc_norm_hidden", width),
        _norm(config, f"{base}/norm", width),
    ]
    if kind == "transformer":
        is_moe = config.num_experts > 0
        rows += _decoder_layer(config, f"{base}/layers_0", "full_attention", is_moe)
    elif kind == "mlp":
        rows += _feed_forward(f"{base}/mlp", width, config.intermediate_size, "mlp")
        rows.append(_norm(config, f"{base}/mlp_norm", width))
    return rows


def _deltanet(config, base):
    width, part = config.hidden_size, "deltanet"
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    repeats = heads // groups
    channels = 2 * key_dim + repeats * value_dim
    taps = config.linear_conv_kernel_dim
    return [
        Weight(
            f"{base}/conv1d",
            (taps, groups, channels),
            part,
            (_published(f"{base}/conv1d/weight"),),
            (groups * channels, 1, taps),
            _conv_layout(groups, key_dim, repeats * value_dim),
        ),
        _plain(f"{base}/A_log", (heads,), part, suffix=False),
        _plain(f"{base}/dt_bias", (heads,), part, suffix=False),
        _to_heads(f"{base}/in_proj_qkvz", width, groups, channels + repeats * value_dim, part),
        _to_heads(f"{base}/in_proj_ba", width, groups, 2 * repeats, part),
        _plain(f"{base}/norm/weight", (value_dim,), "norm"),
        _from_heads(f"{base}/out_proj", heads, value_dim, width, part),
    ]


def _attention(config, base):
    width, dim, part = config.hidden_size, config.head_dim, "attention"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query_dim = 2 * dim if config.attention_type == "gated_attention" else dim
    return [
        _to_heads(f"{base}/q_proj", width, heads, query_dim, part),
        _to_heads(f"{base}/k_proj", width, groups, dim, part),
        _to_heads(f"{base}/v_proj", width, groups, dim, part),
        _from_heads(f"{base}/o_proj", heads, dim, width, part),
        _norm(config, f"{base}/q_norm", dim),
        _norm(config, f"{base}/k_norm", dim),
    ]


def _mixture(config, base):
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    published = _published(f"{base}/experts")
    each = [f"{published}.{e}" for e in range(experts)]
    rows = [
        _dense(f"{base}/gate", width, experts, "router"),
        Weight(
            f"{base}/experts/gate_up",
            (experts, width, 2 * inner),
            "experts",
            tuple(f"{e}.{name}.weight" for e in each for name in ("gate_proj", "up_proj")),
            (inner, width),
            _gate_up_layout(experts),
            (f"{published}.gate_up_proj", (experts, 2 * inner, width), _SWAP),
        ),
        Weight(
            f"{base}/experts/down",
            (experts, inner, width),
            "experts",
            tuple(f"{e}.down_proj.weight" for e in each),
            (width, inner),
            _STACK_SWAP,
            (f"{published}.down_proj", (experts, width, inner), _SWAP),
        ),
    ]
    if config.shared_expert_intermediate_size:
        shared = config.shared_expert_intermediate_size
        rows += _feed_forward(f"{base}/shared_expert", width, shared, "shared_expert")
        rows.append(_dense(f"{base}/shared_expert_gate", width, 1, "shared_expert"))
    return rows


def _feed_forward(base, width, inner, part):
    return [
        _dense(f"{base}/gate_proj", width, inner, part),
        _dense(f"{base}/up_proj", width, inner, part),
        _dense(f"{base}/down_proj", inner, width, part),
    ]


def _published(path):
    return path.replace("/layers_", "/layers/").replace("/", ".")


def _plain(path, shape, part, suffix=True):
    name = _published(path.rsplit("/", 1)[0]) + ".weight" if suffix else _published(path)
    return Weight(path, shape, part, (name,), shape, SAME)


def _norm(config, path, width):
    # Keras' own RMS norm calls its weight `scale`.
    leaf = "weight" if config.normalization_type == "zero_centered_rms_norm" else "scale"
    return _plain(f"{path}/{leaf}", (width,), "norm")


def _dense(path, width, units, part):
    tensors = (_published(path) + ".weight",)
    return Weight(f"{path}/kernel", (width, units), part, tensors, (units, width), _SWAP)


def _to_heads(path, width, heads, dim, part):
    """Published rows are (head, dim), as the kernel's last two axes are."""
    layout = Layout(
        load=lambda tensors: tensors[0].T.reshape(width, heads, dim),
        save=lambda array: [array.reshape(width, heads * dim).T],
    )
    tensors = (_published(path) + ".weight",)
    shape = (width, heads, dim)
    return Weight(f"{path}/kernel", shape, part, tensors, (heads * dim, width), layout)


def _from_heads(path, heads, dim, width, part):
    layout = Layout(
        load=lambda tensors: tensors[0].T.reshape(heads, dim, width),
        save=lambda array: [array.reshape(heads * dim, width).T],
    )
    tensors = (_published(path) + ".weight",)
    shape = (heads, dim, width)
    return Weight(f"{path}/kernel", shape, part, tensors, (width, heads * dim), layout)


def _conv_layout(groups, key_dim, values):
    """Published channels are all queries, all keys, all values; ours stand key head by key head."""
    sizes = (key_dim, key_dim, values)
    bounds = [groups * key_dim, 2 * groups * key_dim]

    def load(tensors):
        taps = tensors[0][:, 0].T  # (W, C)
        pieces = np.split(taps, bounds, axis=1)
        pieces = [p.reshape(len(taps), groups, size) for p, size in zip(pieces, sizes)]
        return np.concatenate(pieces, axis=-1)

    def save(array):
        pieces = np.split(array, [key_dim, 2 * key_dim], axis=-1)
        taps = np.concatenate([p.reshape(len(array), -1) for p in pieces], axis=1)
        return [taps.T[:, None]]

    return Layout(load, save)


def _gate_up_layout(experts):
    def load(tensors):
        width, inner = tensors[0].shape[::-1]
        stacked = np.empty((experts, width, 2 * inner), tensors[0].dtype)
        for e in range(experts):
            stacked[e, :, :inner] = tensors[2 * e].T
            stacked[e, :, inner:] = tensors[2 * e + 1].T
        return stacked

    def save(array):
        halves = (half.T for expert in array for half in np.split(expert, 2, axis=-1))
        return list(halves)

    return Layout(load, save)


def _stack_swapped(tensors):
    stacked = np.empty((len(tensors), *tensors[0].shape[::-1]), tensors[0].dtype)
    for e in range(len(tensors)):
        stacked[e] = tensors[e].T
    return stacked


SAME = Layout(load=lambda tensors: tensors[0], save=lambda array: [array])
_SWAP = Layout(
    load=lambda tensors: np.swapaxes(tensors[0], -1, -2),
    save=lambda array: [np.swapaxes(array, -1, -2)],
)
_STACK_SWAP = Layout(load=_stack_swapped, save=lambda array: [expert.T for expert in array])
