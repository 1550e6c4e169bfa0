"""Every weight of a model, declared once from its configuration.

One row per variable: where it lives in the model, its shape, dtype and logical axes, the part of
the model it belongs to, and the published tensors it is made of. Parameter counts, import, export
and sharding all read this table; a test holds it against the variables of built models.
"""

from collections.abc import Callable
from typing import NamedTuple

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.think_weights import think_loop_rows
from qwen3_next.models.weight_layouts import (
    SAME,
    STACK_SWAP,
    SWAP,
    conv_layout,
    gate_up_layout,
)
from qwen3_next.models.weight_rows import (
    Fused,
    Weight,
    bare_row,
    dense_row,
    from_heads_row,
    norm_row,
    plain_row,
    published_name,
    to_heads_row,
)


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
    embedding = plain_row(
        "model/embed_tokens/embeddings", (vocab, width), ("vocab", "embed"), "embedding"
    )
    if num_labels is None and config.tie_word_embeddings:
        embedding = embedding._replace(tied=("lm_head.weight",))
    rows = [embedding]
    for index in range(config.num_layers):
        rows += _layer(config, index)
    rows.append(norm_row(config, "model/norm", width))
    rows += think_loop_rows(config, "model/think_loop")
    if num_labels is not None:
        score = dense_row("score", (width, num_labels), ("embed", "labels"), "head")
        rows.append(score._replace(dtype="float32", optional=True))
    elif not config.tie_word_embeddings:
        rows.append(dense_row("lm_head", (width, vocab), ("embed", "vocab"), "head"))
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
    rows = [norm_row(config, f"{base}/input_layernorm", width)]
    if kind == "linear_attention":
        rows += _deltanet(config, f"{base}/linear_attn")
    else:
        rows += _attention(config, f"{base}/self_attn")
    rows.append(norm_row(config, f"{base}/post_attention_layernorm", width))
    if is_moe:
        return rows + _moe(config, f"{base}/mlp")
    return rows + _feed_forward(f"{base}/mlp", width, config.intermediate_size, "mlp")


def _mtp(config, base):
    width, kind = config.hidden_size, config.mtp.mtp_head_type
    rows = [
        # The output of a projection from the embedding and the hidden state, both D wide.
        dense_row(f"{base}/fc", (2 * width, width), ("embed", "embed"), "mtp"),
        norm_row(config, f"{base}/pre_fc_norm_embedding", width),
        norm_row(config, f"{base}/pre_fc_norm_hidden", width),
        norm_row(config, f"{base}/norm", width),
    ]
    if kind == "transformer":
        is_moe = config.num_experts > 0
        rows += _decoder_layer(config, f"{base}/layers_0", "full_attention", is_moe)
    elif kind == "mlp":
        rows += _feed_forward(f"{base}/mlp", width, config.intermediate_size, "mlp")
        rows.append(norm_row(config, f"{base}/mlp_norm", width))
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
            (published_name(f"{base}/conv1d/weight"),),
            (groups * channels, 1, taps),
            conv_layout(groups, key_dim, repeats * value_dim),
        ),
        bare_row(f"{base}/A_log", (heads,), value_heads, part),
        bare_row(f"{base}/dt_bias", (heads,), value_heads, part),
        to_heads_row(
            f"{base}/in_proj_qkvz", width, groups, qkvz, (key_heads, "linear_head_dim"), part
        ),
        to_heads_row(
            f"{base}/in_proj_ba", width, groups, 2 * repeats, (key_heads, "linear_head_dim"), part
        ),
        plain_row(f"{base}/norm/weight", (value_dim,), ("linear_head_dim",), "norm"),
        from_heads_row(
            f"{base}/out_proj", heads, value_dim, width, (*value_heads, "linear_head_dim"), part
        ),
    ]


def _attention(config, base):
    width, dim, part = config.hidden_size, config.head_dim, "attention"
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query_dim = 2 * dim if config.attention_type == "gated_attention" else dim
    gate_bias = f"{base}/gate_bias"
    axes = ("heads", "head_dim")
    biases = [
        Weight(
            gate_bias, (heads, dim), axes, part, (published_name(gate_bias),), (heads, dim), SAME
        )
    ]
    return [
        to_heads_row(f"{base}/q_proj", width, heads, query_dim, ("heads", "head_dim"), part),
        to_heads_row(f"{base}/k_proj", width, groups, dim, ("kv_heads", "head_dim"), part),
        to_heads_row(f"{base}/v_proj", width, groups, dim, ("kv_heads", "head_dim"), part),
        from_heads_row(f"{base}/o_proj", heads, dim, width, ("heads", "head_dim"), part),
        norm_row(config, f"{base}/q_norm", dim, "head_dim"),
        norm_row(config, f"{base}/k_norm", dim, "head_dim"),
        *(biases if config.attention_gate_bias is not None else ()),
    ]


def _moe(config, base):
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    published = published_name(f"{base}/experts")
    each = [f"{published}.{e}" for e in range(experts)]
    router = dense_row(f"{base}/gate", (width, experts), ("embed", "scores"), "router")
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
        rows.append(dense_row(f"{base}/shared_expert_gate", (width, 1), ("embed", "one"), part))
    return rows


def _feed_forward(base, width, inner, part):
    return [
        dense_row(f"{base}/gate_proj", (width, inner), ("embed", "mlp"), part),
        dense_row(f"{base}/up_proj", (width, inner), ("embed", "mlp"), part),
        dense_row(f"{base}/down_proj", (inner, width), ("mlp", "embed"), part),
    ]
