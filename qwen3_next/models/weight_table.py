"""Every weight of a model, declared once from its configuration.

One row per variable: where it lives in the model, its shape, dtype and logical axes, the part of
the model it belongs to, and the published tensors it is made of. Parameter counts, import, export
and sharding all read this table; a test holds it against the variables of built models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.weight_layouts import (
    SAME,
    STACK_SWAP,
    SWAP,
    Layout,
    conv_layout,
    from_heads_layout,
    gate_up_layout,
    to_heads_layout,
)

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
    "think",
    "mtp",
)
AXES = (
    "vocab",  # V
    "embed",  # D, the residual stream
    "heads",  # H, query heads
    "kv_heads",  # G, key and value heads
    "head_dim",
    "linear_key_heads",  # of a DeltaNet, with everything that belongs to a key head behind it
    "linear_value_heads",
    "linear_head_dim",
    "taps",
    "experts",  # E
    "expert_mlp",  # F
    "mlp",
    "labels",
    "router_hidden",
    "actions",
    "lora_experts",  # N
    "lora_rank",
    "lora_in",  # of a projection, all its dims in one
    "lora_out",
    "one",
)


ACTIONS = 3  # of a layer router


class Fused(NamedTuple):
    """The one tensor that some checkpoints hold instead of one per expert.

    Attributes:
        tensor: Its published name.
        shape: Its shape.
        layout: How it makes up the variable.
    """

    tensor: str
    shape: tuple[int, ...]
    layout: Layout


class Weight(NamedTuple):
    """One variable.

    Attributes:
        path: Where it is, relative to the model.
        shape: Shape of the variable.
        axes: Logical axis, one of `AXES`, for each of its dims.
        part: What it is counted as, one of `PARTS`.
        tensors: Names of the published tensors it is made of.
        tensor_shape: Shape of each of them.
        layout: How they make up the variable.
        fused: The one tensor that may stand for all of them, or `None`.
        dtype: `"float32"` for what is float32 under every dtype policy, else `None`.
        optional: Whether a checkpoint may lack it; it then keeps its initial values.
        zeros: Whether those are zeros.
        tied: Names of tensors that a checkpoint may hold as well, with the same values.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    part: str
    tensors: tuple[str, ...]
    tensor_shape: tuple[int, ...]
    layout: Layout
    fused: Fused | None = None
    dtype: str | None = None
    optional: bool = False
    tied: tuple[str, ...] = ()
    zeros: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Unneeded(NamedTuple):
    """A kind of tensor that a checkpoint may hold and a model has no use for.

    Attributes:
        matches: Whether a tensor's name, with dots, is of that kind.
        reason: Why it is left over.
    """

    matches: Callable[[str], bool]
    reason: str


def weight_table(config: Qwen3NextConfig, num_labels: int | None = None) -> list[Weight]:
    """All weights of a language model, or with `num_labels` of a classifier, in model order."""
    width, vocab = config.hidden_size, config.vocab_size
    embedding = _plain(
        "model/embed_tokens/embeddings", (vocab, width), ("vocab", "embed"), "embedding"
    )
    if num_labels is None and config.tie_word_embeddings:
        embedding = embedding._replace(tied=("lm_head.weight",))
    rows = [embedding]
    for index in range(config.num_layers):
        rows += _layer(config, index)
    rows.append(_norm(config, "model/norm", width))
    rows += _think_loop(config, "model/think_loop")
    if num_labels is not None:
        score = _dense("score", (width, num_labels), ("embed", "labels"), "head")
        rows.append(score._replace(dtype="float32", optional=True))
    elif not config.tie_word_embeddings:
        rows.append(_dense("lm_head", (width, vocab), ("embed", "vocab"), "head"))
    if num_labels is None and config.mtp is not None:
        for number in range(config.mtp.num_modules):
            rows += _mtp(config, mtp_name(number))
    return rows


def unneeded_tensors(num_labels: int | None = None) -> list[Unneeded]:
    """What a checkpoint may hold beyond the weights of a language model, or of a classifier."""
    found = [
        Unneeded(
            lambda name: name.startswith("mtp."),
            "multi-token prediction head, used with `mtp=MTPConfig()`",
        ),
        Unneeded(
            lambda name: name.endswith(".rotary_emb.inv_freq"), "rotary frequencies, computed"
        ),
    ]
    if num_labels is not None:
        heads = ("lm_head.weight", "lm_head.kernel")
        found.append(Unneeded(heads.__contains__, "vocabulary head, not used by a classifier"))
    return found


def mtp_name(number: int) -> str:
    """Name of an MTP module; the first has the published one."""
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
        return rows + _moe(config, f"{base}/mlp")
    return rows + _feed_forward(f"{base}/mlp", width, config.intermediate_size, "mlp")


def _think_loop(config, base):
    """What a think loop has beyond its layers; no published checkpoint holds any of it."""
    width, etd = config.hidden_size, config.etd
    if etd is None:
        return []
    rows, float32 = [], []
    if etd.adaptive_depth:
        float32 += _biased(f"{base}/halting_unit/score", (width, 1), ("embed", "one"))
    if etd.input_injection:
        injection = _dense(f"{base}/injection", (width, width), ("embed", "embed"), "think")
        rows.append(injection._replace(zeros=True))
    if etd.use_layer_router:
        hidden, inner = etd.layer_router.hidden_size, ("embed", "router_hidden")
        for place in range(etd.n_think_layers):
            router = f"{base}/router_{place}"
            score = _biased(f"{router}/score", (hidden, ACTIONS), ("router_hidden", "actions"))
            float32 += _biased(f"{router}/features", (width, hidden), inner)
            float32 += [row._replace(zeros=True) for row in score]
    if etd.use_lora_experts:
        experts, router = (etd.num_lora_experts,), f"{base}/expert_router"
        axes = ("embed", "lora_experts")
        float32.append(_dense(f"{router}/score", (2 * width, *experts), axes, "think"))
        for name in ("selection_bias", "selected"):
            row = _bare(f"{router}/{name}", experts, ("lora_experts",), "think")
            float32.append(row._replace(zeros=True))
        rows += _lora_experts(config, base)
    rows += [row._replace(dtype="float32") for row in float32]
    return [row._replace(optional=True) for row in rows]


def _lora_experts(config, base):
    experts, rank, rows = config.etd.num_lora_experts, config.etd.lora_expert.rank, []
    first, behind = config.etd.get_layer_ranges()["think"]
    for layer in range(first, behind):
        for name in config.adapted_projections(layer):
            inputs, outputs = map(math.prod, projection_dims(config, name))
            path = f"{base}/experts_{layer - first}_{name}"
            for leaf, shape, axes in (
                ("lora_a", (inputs, experts, rank), ("lora_in", "lora_experts", "lora_rank")),
                ("lora_b", (experts, rank, outputs), ("lora_experts", "lora_rank", "lora_out")),
            ):
                row = _bare(f"{path}/{leaf}", shape, axes, "think")
                rows.append(row._replace(dtype=None, zeros=leaf == "lora_b"))
    return rows


def projection_dims(config: Qwen3NextConfig, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output dims of a projection of a mixer, or of `block_output`."""
    width = (config.hidden_size,)
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query_dim = 2 * dim if config.attention_type == "gated_attention" else dim
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    repeats, value_dim = value_heads // key_heads, config.linear_value_head_dim
    qkvz = 2 * (config.linear_key_head_dim + repeats * value_dim)
    return {
        "q_proj": (width, (heads, query_dim)),
        "k_proj": (width, (groups, dim)),
        "v_proj": (width, (groups, dim)),
        "o_proj": ((heads, dim), width),
        "in_proj_qkvz": (width, (key_heads, qkvz)),
        "in_proj_ba": (width, (key_heads, 2 * repeats)),
        "out_proj": ((value_heads, value_dim), width),
        "block_output": (width, width),
    }[name]


def _mtp(config, base):
    width, kind = config.hidden_size, config.mtp.mtp_head_type
    rows = [
        # The output of a projection from the embedding and the hidden state, both D wide.
        _dense(f"{base}/fc", (2 * width, width), ("embed", "embed"), "mtp"),
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
    key_heads, value_heads = "linear_key_heads", ("linear_value_heads",)
    qkvz = channels + repeats * value_dim
    return [
        Weight(
            f"{base}/conv1d",
            (taps, groups, channels),
            ("taps", key_heads, "linear_head_dim"),
            part,
            (_published(f"{base}/conv1d/weight"),),
            (groups * channels, 1, taps),
            conv_layout(groups, key_dim, repeats * value_dim),
        ),
        _bare(f"{base}/A_log", (heads,), value_heads, part),
        _bare(f"{base}/dt_bias", (heads,), value_heads, part),
        _to_heads(
            f"{base}/in_proj_qkvz", width, groups, qkvz, (key_heads, "linear_head_dim"), part
        ),
        _to_heads(
            f"{base}/in_proj_ba", width, groups, 2 * repeats, (key_heads, "linear_head_dim"), part
        ),
        _plain(f"{base}/norm/weight", (value_dim,), ("linear_head_dim",), "norm"),
        _from_heads(
            f"{base}/out_proj", heads, value_dim, width, (*value_heads, "linear_head_dim"), part
        ),
    ]


def _attention(config, base):
    width, dim, part = config.hidden_size, config.head_dim, "attention"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query_dim = 2 * dim if config.attention_type == "gated_attention" else dim
    return [
        _to_heads(f"{base}/q_proj", width, heads, query_dim, ("heads", "head_dim"), part),
        _to_heads(f"{base}/k_proj", width, groups, dim, ("kv_heads", "head_dim"), part),
        _to_heads(f"{base}/v_proj", width, groups, dim, ("kv_heads", "head_dim"), part),
        _from_heads(f"{base}/o_proj", heads, dim, width, ("heads", "head_dim"), part),
        _norm(config, f"{base}/q_norm", dim, "head_dim"),
        _norm(config, f"{base}/k_norm", dim, "head_dim"),
    ]


def _moe(config, base):
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    published = _published(f"{base}/experts")
    each = [f"{published}.{e}" for e in range(experts)]
    router = _dense(f"{base}/gate", (width, experts), ("embed", "experts"), "router")
    rows = [
        router._replace(dtype="float32"),
        Weight(
            f"{base}/experts/gate_up",
            (experts, width, 2 * inner),
            ("experts", "embed", "expert_mlp"),
            "experts",
            tuple(f"{e}.{name}.weight" for e in each for name in ("gate_proj", "up_proj")),
            (inner, width),
            gate_up_layout(experts),
            Fused(f"{published}.gate_up_proj", (experts, 2 * inner, width), SWAP),
        ),
        Weight(
            f"{base}/experts/down",
            (experts, inner, width),
            ("experts", "expert_mlp", "embed"),
            "experts",
            tuple(f"{e}.down_proj.weight" for e in each),
            (width, inner),
            STACK_SWAP,
            Fused(f"{published}.down_proj", (experts, width, inner), SWAP),
        ),
    ]
    if config.shared_expert_intermediate_size:
        shared, part = config.shared_expert_intermediate_size, "shared_expert"
        rows += _feed_forward(f"{base}/shared_expert", width, shared, part)
        rows.append(_dense(f"{base}/shared_expert_gate", (width, 1), ("embed", "one"), part))
    return rows


def _feed_forward(base, width, inner, part):
    return [
        _dense(f"{base}/gate_proj", (width, inner), ("embed", "mlp"), part),
        _dense(f"{base}/up_proj", (width, inner), ("embed", "mlp"), part),
        _dense(f"{base}/down_proj", (inner, width), ("mlp", "embed"), part),
    ]


def _published(path):
    return path.replace("/layers_", "/layers/").replace("/", ".")


def _plain(path, shape, axes, part):
    """A weight that is published as it stands, called `weight` there."""
    tensors = (_published(path.rsplit("/", 1)[0]) + ".weight",)
    return Weight(path, shape, axes, part, tensors, shape, SAME)


def _biased(path, shape, axes):
    """Kernel and bias of a part of a think loop."""
    bias = _plain(f"{path}/bias", shape[1:], axes[1:], "think")
    bias = bias._replace(tensors=(_published(f"{path}/bias"),), zeros=True)
    return [_dense(path, shape, axes, "think"), bias]


def _bare(path, shape, axes, part):
    """A float32 weight that is published as it stands and under its own name."""
    return Weight(path, shape, axes, part, (_published(path),), shape, SAME, dtype="float32")


def _norm(config, path, width, axis="embed"):
    # Keras' own RMS norm calls its weight `scale`.
    leaf = "weight" if config.normalization_type == "zero_centered_rms_norm" else "scale"
    return _plain(f"{path}/{leaf}", (width,), (axis,), "norm")


def _dense(path, shape, axes, part):
    tensors = (_published(path) + ".weight",)
    return Weight(f"{path}/kernel", shape, axes, part, tensors, shape[::-1], SWAP)


def _to_heads(path, width, heads, dim, axes, part):
    return Weight(
        f"{path}/kernel",
        (width, heads, dim),
        ("embed", *axes),
        part,
        (_published(path) + ".weight",),
        (heads * dim, width),
        to_heads_layout(width, heads, dim),
    )


def _from_heads(path, heads, dim, width, axes, part):
    return Weight(
        f"{path}/kernel",
        (heads, dim, width),
        (*axes, "embed"),
        part,
        (_published(path) + ".weight",),
        (width, heads * dim),
        from_heads_layout(heads, dim, width),
    )
