"""The weights that a think loop has beyond its layers."""

import math

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.weight_rows import bare_row, biased_rows, dense_row

ACTIONS = 3  # of a layer router


def think_loop_rows(config, base):
    """What a think loop has beyond its layers; no published checkpoint holds any of it."""
    width, etd = config.hidden_size, config.etd
    if etd is None:
        return []
    rows, float32 = [], []
    if etd.adaptive_depth:
        float32 += biased_rows(f"{base}/halting_unit/score", (width, 1), ("embed", "one"))
    if etd.input_injection:
        injection = dense_row(f"{base}/injection", (width, width), ("embed", "embed"), "think")
        rows.append(injection._replace(zeros=True))
    if etd.use_layer_router:
        hidden, inner = etd.layer_router.hidden_size, ("embed", "router_hidden")
        for place in range(etd.n_think_layers):
            router = f"{base}/router_{place}"
            score = biased_rows(f"{router}/score", (hidden, ACTIONS), ("router_hidden", "actions"))
            float32 += biased_rows(f"{router}/features", (width, hidden), inner)
            float32 += [row._replace(zeros=True) for row in score]
    if etd.use_lora_experts:
        experts, router = (etd.num_lora_experts,), f"{base}/expert_router"
        axes = ("embed", "lora_experts")
        float32.append(dense_row(f"{router}/score", (2 * width, *experts), axes, "think"))
        for name in ("selection_bias", "selected"):
            row = bare_row(f"{router}/{name}", experts, ("lora_experts",), "think")
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
                row = bare_row(f"{path}/{leaf}", shape, axes, "think")
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
