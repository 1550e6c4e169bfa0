"""Float64 reference implementations, one token or one row at a time, in NumPy alone.

Each function states its equation and is written to be checked by eye, not to be fast. Letters:
B batch, T tokens, D hidden or head dim, H (value) heads, G key heads, K/V key and value head dims,
C channels, W taps, R/N rows, E experts, F expert width. Every result is float64.

`padding_mask` (B, T) is true at real tokens; a pad reads nothing, writes nothing and yields zeros.
`segment_ids` (B, T) name the packed document of each token.
"""

import numpy as np


def _f64(x):
    return np.asarray(x, np.float64)


def _sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # this form cannot overflow


def _silu(x):
    return x * _sigmoid(x)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _real_tokens(row, length, segment_ids, padding_mask):
    """Yields (t, starts) for the real tokens of one row; `starts` marks a new segment."""
    previous = None
    for t in range(length):
        if padding_mask is not None and not padding_mask[row][t]:
            continue
        segment = None if segment_ids is None else segment_ids[row][t]
        # The first real token belongs to whatever the incoming state has seen.
        yield t, previous is not None and segment != previous
        previous = segment


def gated_delta_rule(
    query, key, value, log_decay, beta, state=None, segment_ids=None, padding_mask=None, scale=None
):
    """S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T (scale q), per value head.

    query, key (B, T, G, K); value (B, T, H, V); log_decay g, beta (B, T, H); state (B, H, K, V).
    Value head h reads key head h // (H // G). Returns output (B, T, H, V) and the final state.
    """
    query, key, value = _f64(query), _f64(key), _f64(value)
    decay, beta = np.exp(_f64(log_decay)), _f64(beta)
    batch, length, heads, value_dim = value.shape
    groups, key_dim = key.shape[2:]
    scale = key_dim**-0.5 if scale is None else scale
    state = np.zeros((batch, heads, key_dim, value_dim)) if state is None else _f64(state).copy()
    output = np.zeros(value.shape)
    for b in range(batch):
        for t, starts in _real_tokens(b, length, segment_ids, padding_mask):
            for h in range(heads):
                q, k = (x[b, t, h // (heads // groups)] for x in (query, key))  # (K,)
                s = np.zeros((key_dim, value_dim)) if starts else state[b, h]
                s = decay[b, t, h] * s
                s = s + np.outer(k, beta[b, t, h] * (value[b, t, h] - s.T @ k))
                state[b, h] = s
                output[b, t, h] = s.T @ (scale * q)
    return output, state


def causal_conv1d(inputs, kernel, state=None, segment_ids=None, padding_mask=None, activation=True):
    """y_t = silu(sum_w kernel[w] * u_w), u = the last W real tokens of t's segment, t last.

    inputs (B, T, C); kernel (W, C); state (B, W - 1, C), the real tokens before the first.
    Returns output (B, T, C) and the new state, zero where its segment has no token.
    """
    inputs, kernel = _f64(inputs), _f64(kernel)
    batch, length, channels = inputs.shape
    shape = (batch, len(kernel) - 1, channels)
    state = np.zeros(shape) if state is None else _f64(state).copy()
    output = np.zeros(inputs.shape)
    for b in range(batch):
        for t, starts in _real_tokens(b, length, segment_ids, padding_mask):
            past = np.zeros(shape[1:]) if starts else state[b]
            window = np.concatenate([past, inputs[b, t][None]])  # (W, C)
            total = (window * kernel).sum(0)
            output[b, t] = _silu(total) if activation else total
            state[b] = window[1:]
    return output, state


def causal_attention(q, k, v, padding_mask=None, segment_ids=None, scale=None):
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the real j <= i of i's segment.

    q (B, T, H, D); k, v (B, T, G, D); head h reads k/v head h // (H // G); scale is D**-0.5
    unless given. Returns (B, T, H, D).
    """
    q, k, v = _f64(q), _f64(k), _f64(v)
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    everything = np.ones((batch, length))
    real = np.asarray(everything if padding_mask is None else padding_mask, bool)
    segments = np.asarray(everything if segment_ids is None else segment_ids)
    output = np.zeros((batch, length, heads, v.shape[-1]))
    for b, i in np.argwhere(real):
        seen = np.nonzero(real[b, : i + 1] & (segments[b, : i + 1] == segments[b, i]))[0]
        for h in range(heads):
            g = h // (heads // k.shape[2])
            weights = _softmax(scale * (k[b, seen, g] @ q[b, i, h]))
            output[b, i, h] = weights @ v[b, seen, g]
    return output


def rotary(x, positions, theta, partial_rotary_factor=1.0):
    """(x_i, x_{i+d/2}) turned by the angle position * theta^(-2i/d), for i < d/2.

    x (B, T, H, D); positions (B, T); d = D * partial_rotary_factor. Dims from d on stay as is.
    """
    x = _f64(x).copy()
    dim = int(x.shape[-1] * partial_rotary_factor)
    half = dim // 2
    frequency = _f64(theta) ** (-2.0 * np.arange(half) / dim)
    angle = (_f64(positions)[..., None] * frequency)[:, :, None]  # (B, T, 1, d/2)
    first, second = x[..., :half].copy(), x[..., half:dim].copy()
    x[..., :half] = first * np.cos(angle) - second * np.sin(angle)
    x[..., half:dim] = second * np.cos(angle) + first * np.sin(angle)
    return x


def rms_norm(x, scale, eps):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; a zero-centred weight is scale - 1."""
    x = _f64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * _f64(scale)


def gated_rms_norm(x, gate, weight, eps):
    """rms_norm(x, weight) * silu(gate): the norm does not see the gate."""
    return rms_norm(x, weight, eps) * _silu(_f64(gate))


def grouped_matmul(rows, weights, group_sizes):
    """y_r = x_r W_e: the first group_sizes[0] rows use expert 0, the next ones expert 1, ...

    rows (R, D); weights (E, D, F); group_sizes (E,). Rows after the last group yield zeros.
    """
    rows, weights = _f64(rows), _f64(weights)
    output = np.zeros((len(rows), weights.shape[-1]))
    start = 0
    for matrix, size in zip(weights, group_sizes, strict=True):
        output[start : start + size] = rows[start : start + size] @ matrix
        start += size
    return output


def sparse_moe(x, router, gate_up, down, top_k, norm_topk_prob, shared=None):
    """y = sum_{e in top_k(p)} w_e down_e(silu(gate_e x) up_e x) + sigmoid(x . s) shared(x).

    p = softmax(x router); w = p at the chosen experts, divided by its sum if norm_topk_prob.
    x (N, D); router (D, E); gate_up (E, D, 2F), gate first; down (E, F, D); shared is None or
    (gate (D, S), up (D, S), down (S, D), s (D, 1)).
    Returns output (N, D), p (N, E) and the chosen experts (N, top_k), the likeliest first.
    """
    x, gate_up, down = _f64(x), _f64(gate_up), _f64(down)
    probabilities = _softmax(x @ _f64(router))
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    output = np.zeros(x.shape)
    for n, experts in enumerate(chosen):
        weights = probabilities[n, experts]
        weights = weights / weights.sum() if norm_topk_prob else weights
        for e, weight in zip(experts, weights, strict=True):
            gate, up = np.split(x[n] @ gate_up[e], 2)
            output[n] += weight * ((_silu(gate) * up) @ down[e])
    if shared is not None:
        gate, up, shared_down, gate_vector = map(_f64, shared)
        output += _sigmoid(x @ gate_vector) * ((_silu(x @ gate) * (x @ up)) @ shared_down)
    return output, probabilities, chosen


def cross_entropy(logits, labels, ignore_index=-100):
    """-log softmax(logits)[label] for each row, 0 where the label is ignore_index.

    logits (N, V); labels (N,). Returns (N,).
    """
    logits, labels = _f64(logits), np.asarray(labels)
    top = logits.max(-1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    kept = labels != ignore_index
    picked = logits[np.arange(len(labels)), np.where(kept, labels, 0)]
    return np.where(kept, log_total - picked, 0.0)


def load_balancing_loss(probabilities, chosen, mask=None):
    """E * sum_e f_e P_e, f_e = (times e was chosen) / rows, P_e = mean probability of e.

    Rows of all layers count together, as in Hugging Face: f sums to top_k, so a balanced router
    scores top_k. probabilities: a (rows, E) array per layer; chosen: (rows, top_k) per layer;
    mask: (rows,), or anything that flattens to it, true at real tokens, shared by the layers.
    """
    experts = probabilities[0].shape[-1]
    mask = np.ones(len(probabilities[0])) if mask is None else _f64(mask).reshape(-1)
    counts, totals = np.zeros(experts), np.zeros(experts)
    for layer_probabilities, layer_chosen in zip(probabilities, chosen, strict=True):
        for row, weight in enumerate(mask):
            counts[np.asarray(layer_chosen)[row]] += weight
            totals += weight * _f64(layer_probabilities)[row]
    rows = mask.sum() * len(probabilities)
    return experts * (counts / rows * totals / rows).sum()


def multi_token_prediction(embedding, hidden, weights, heads, groups, theta, rotated, eps):
    """norm(layer(W [norm_e(embedding); norm_h(hidden)])), a layer of attention and dense SwiGLU.

    embedding, hidden (B, T, D); weights by name, norms zero-centred, q_proj (D, H, 2 dim) with the
    gate of a head behind its query. Returns (B, T, D).
    """
    w = {name: _f64(value) for name, value in weights.items()}

    def norm(x, name):
        return rms_norm(x, 1.0 + w[name], eps)

    parts = norm(embedding, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")
    x = np.concatenate(parts, axis=-1) @ w["fc"]
    h = norm(x, "layers_0/input_layernorm")
    both = np.einsum("btd,dhk->bthk", h, w["layers_0/self_attn/q_proj"])
    q, gate = np.split(both, 2, axis=-1)
    k, v = (
        np.einsum("btd,dhk->bthk", h, w[f"layers_0/self_attn/{name}"])
        for name in ("k_proj", "v_proj")
    )
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    q = rotary(norm(q, "layers_0/self_attn/q_norm"), positions, theta, rotated)
    k = rotary(norm(k, "layers_0/self_attn/k_norm"), positions, theta, rotated)
    o = causal_attention(q, k, v) * _sigmoid(gate)
    x = x + np.einsum("bthk,hkd->btd", o, w["layers_0/self_attn/o_proj"])
    h = norm(x, "layers_0/post_attention_layernorm")
    inner = _silu(h @ w["layers_0/mlp/gate_proj"]) * (h @ w["layers_0/mlp/up_proj"])
    return norm(x + inner @ w["layers_0/mlp/down_proj"], "norm")
