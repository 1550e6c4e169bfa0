"""The whole language model in float64, in NumPy alone: every layer as `oracles` states it.

    next_logits(weights_by_path, config, token_ids) -> (B, T, V)

`weights_by_path` names the weights as `qwen3_next.models.weight_table` does, with our layouts;
`config` is a `Qwen3NextConfig`. Linear and full layers, MoE and dense networks, either norm.
Letters as in `oracles`: B batch, T tokens, D width, G key heads, R value heads per key head.
"""

import numpy as np

from tests.support import oracles


def next_logits(weights_by_path, config, token_ids):
    """Logits `(B, T, V)` of `token_ids (B, T)`; rows are independent and have no padding."""
    weights = {path: np.asarray(array, np.float64) for path, array in weights_by_path.items()}
    embeddings = weights["model/embed_tokens/embeddings"]
    hidden = embeddings[np.asarray(token_ids)]
    for index in range(config.num_layers):
        hidden = decoder_layer(below(weights, f"model/layers_{index}/"), config, index, hidden)
    hidden = _norm(weights, "model/norm", config, hidden)
    return hidden @ (embeddings.T if config.tie_word_embeddings else weights["lm_head/kernel"])


def decoder_layer(weights, config, index, x, updates=True):
    """h = x + mixer(norm_1(x));  y = h + mlp(norm_2(h)). Paths are relative to the layer.

    Where `updates (B, T, 1)` is false the residual stands still, and the mixer reads it as it is.
    """
    normed = _norm(weights, "input_layernorm", config, x)
    if config.layer_types[index] == "linear_attention":
        x = x + updates * delta_net(below(weights, "linear_attn/"), config, normed)
    else:
        x = x + updates * attention(below(weights, "self_attn/"), config, normed)
    normed = _norm(weights, "post_attention_layernorm", config, x)
    return x + updates * feed_forward(below(weights, "mlp/"), config, normed)


def think_loop(weights, config, x, iterations, final_state=False):
    """The think layers on `x (B, T, D)`: their output, and how often each token thought, `(B, T)`.

    Paths are those of a backbone. Every token is followed by itself, with the sums of Graves
    (2016): weights p_1 .. p_(N-1) and the rest for the state of the last iteration N.
    """
    etd = config.etd
    layers = range(*etd.get_layer_ranges()["think"])
    score = below(weights, "model/think_loop/halting_unit/score/")
    start, mean = x, np.zeros_like(x)
    total, live = np.zeros(x.shape[:2]), np.ones(x.shape[:2], bool)
    depth = np.zeros(x.shape[:2], int)
    for iteration in range(1, iterations + 1):
        if etd.input_injection and iteration > 1:
            x = x + live[..., None] * (start @ weights["model/think_loop/injection/kernel"])
        for layer in layers:
            own = below(weights, f"model/layers_{layer}/")
            x = decoder_layer(own, config, layer, x, live[..., None])
        depth += live
        if not etd.adaptive_depth:
            continue
        p = _sigmoid(x @ score["kernel"] + score["bias"])[..., 0]
        if etd.granularity == "sequence":
            p = np.cumsum(p, axis=1) / np.arange(1, x.shape[1] + 1)
        stops = live & ((total + p >= etd.confidence_threshold) | (iteration == iterations))
        weight = np.where(stops, 1 - total, p) * live
        mean += weight[..., None] * x
        total, live = np.where(live, total + p, total), live & ~stops
    return x if final_state or not etd.adaptive_depth else mean, depth


def delta_net(weights, config, x):
    """Projections and channels stand key head by key head, `[q | k | v of R heads | z of R]`."""
    batch, length, _ = x.shape
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    taps, _, channels = weights["conv1d"].shape
    qkvz = np.einsum("btd,dgc->btgc", x, weights["in_proj_qkvz/kernel"])
    conv, _ = oracles.causal_conv1d(
        qkvz[..., :channels].reshape(batch, length, -1), weights["conv1d"].reshape(taps, -1)
    )
    conv = conv.reshape(batch, length, groups, channels)
    query, key, value = np.split(conv, [key_dim, 2 * key_dim], axis=-1)
    value, gate = (
        part.reshape(batch, length, heads, value_dim) for part in (value, qkvz[..., channels:])
    )
    ba = np.einsum("btd,dgc->btgc", x, weights["in_proj_ba/kernel"])
    b, a = (part.reshape(batch, length, heads) for part in np.split(ba, 2, axis=-1))
    log_decay = _log_decay(a, weights["A_log"], weights["dt_bias"])
    output, _ = oracles.gated_delta_rule(_unit(query), _unit(key), value, log_decay, _sigmoid(b))
    output = oracles.gated_rms_norm(output, gate, weights["norm/weight"], config.rms_norm_eps)
    return np.einsum("bthv,hvd->btd", output, weights["out_proj/kernel"])


def attention(weights, config, x):
    """Queries and keys normed per head, partial rotary, a sigmoid gate on every output."""
    query, key, value = (
        np.einsum("btd,dhk->bthk", x, weights[f"{name}_proj/kernel"]) for name in "qkv"
    )
    gate = None
    if config.attention_type == "gated_attention":
        query, gate = np.split(query, 2, axis=-1)
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    query, key = (
        oracles.rotary(
            _norm(weights, name, config, part),
            positions,
            config.rope_theta,
            config.partial_rotary_factor,
        )
        for name, part in (("q_norm", query), ("k_norm", key))
    )
    output = oracles.causal_attention(query, key, value)
    if gate is not None:
        output = output * _sigmoid(gate)
    return np.einsum("bthk,hkd->btd", output, weights["o_proj/kernel"])


def feed_forward(weights, config, x):
    """MoE where there are experts, else a dense gated network."""
    if config.ffn_type != "swiglu":
        raise ValueError(f"The oracle knows SwiGLU alone. Received: {config.ffn_type=}")
    names = ("gate_proj/kernel", "up_proj/kernel", "down_proj/kernel")
    if "experts/down" not in weights:
        gate, up, down = (weights[name] for name in names)
        inner = x @ gate
        return (inner * _sigmoid(inner) * (x @ up)) @ down
    shared = None
    if config.shared_expert_intermediate_size:
        shared = [weights[f"shared_expert/{name}"] for name in names]
        shared.append(weights["shared_expert_gate/kernel"])
    output, _, _ = oracles.sparse_moe(
        x.reshape(-1, x.shape[-1]),
        weights["gate/kernel"],
        weights["experts/gate_up"],
        weights["experts/down"],
        config.num_experts_per_tok,
        config.norm_topk_prob,
        shared,
    )
    return output.reshape(x.shape)


def _norm(weights, path, config, x):
    if config.normalization_type == "zero_centered_rms_norm":
        scale = 1.0 + weights[f"{path}/weight"]
    else:
        scale = weights[f"{path}/scale"]
    return oracles.rms_norm(x, scale, config.rms_norm_eps)


def _log_decay(a, rate_log, bias):
    return -np.exp(rate_log) * np.logaddexp(0.0, a + bias)


def _unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def below(weights, prefix):
    return {p.removeprefix(prefix): w for p, w in weights.items() if p.startswith(prefix)}
