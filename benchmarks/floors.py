"""The least floating-point operations and bytes of a row, from its shapes.

Bytes are inputs and weights read once and outputs written once, in bfloat16 but for what the layers
have in float32; what an implementation keeps in between is not counted. A backward pass has two
products for each of the forward pass, and a gradient for all that is read or written.
"""

BF16, F32 = 2, 4
PRODUCT = 2  # a multiplication and an addition


def floor(flops, read_and_written, backward=False):
    """`{"flops": ..., "bytes": ...}` of a forward pass, or of both passes."""
    return {
        "flops": float(flops * (3 if backward else 1)),
        "bytes": float(read_and_written * (2 if backward else 1)),
    }


def delta_rule(length, key_heads, heads, dim, backward=False):
    arrays = length * (2 * (key_heads + heads) * dim * BF16 + 2 * heads * F32)
    return floor(_recurrence(length, heads, dim * dim), arrays, backward)


def attention(length, heads, groups, dim, backward=False):
    arrays = 2 * length * (heads + groups) * dim * BF16
    return floor(_scores(length, heads, dim), arrays, backward)


def moe(tokens, width, experts, chosen, inner, shared, backward=False):
    flops, weights = _experts(tokens, width, experts, chosen, inner, shared)
    return floor(flops, weights + 2 * tokens * width * BF16, backward)


def model(config, batch, length, backward=False):
    """All logits of a forward pass."""
    c, tokens = config, batch * length
    flops, weights = _products(config, tokens)
    for kind in _kinds(config):
        if kind == "linear_attention":
            matrix = c["linear_key_head_dim"] * c["linear_value_head_dim"]
            flops += _recurrence(tokens, c["linear_num_value_heads"], matrix)
        else:
            flops += batch * _scores(length, c["num_attention_heads"], c["head_dim"])
    rows = tokens * (c["hidden_size"] + c["vocab_size"]) * BF16
    return floor(flops, weights + rows, backward)


def decode(config, batch, length, new):
    """The prompt, and then `new - 1` passes of a token per row that read and write their cache."""
    prompt = model(config, batch, length)
    flops, weights = _products(config, batch)
    c, passes, context, state = config, new - 1, length + new // 2, 0
    for kind in _kinds(config):
        if kind == "linear_attention":
            heads = c["linear_num_value_heads"]
            matrix = c["linear_key_head_dim"] * c["linear_value_head_dim"]
            flops += _recurrence(batch, heads, matrix)
            state += 2 * heads * matrix * F32
        else:
            flops += batch * 2 * PRODUCT * context * c["num_attention_heads"] * c["head_dim"]
            state += 2 * context * c["num_key_value_heads"] * c["head_dim"] * BF16
    moved = weights + batch * (state + (c["hidden_size"] + c["vocab_size"]) * BF16)
    return floor(prompt["flops"] + passes * flops, prompt["bytes"] + passes * moved)


def _kinds(config):
    interval = config["full_attention_interval"]
    return config.get("layer_types") or [
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(config["num_layers"])
    ]


def _products(config, tokens):
    """Operations and bytes of all kernels, without what has none."""
    c, width = config, config["hidden_size"]
    attention = c["num_attention_heads"] * c["head_dim"]
    written = c["num_key_value_heads"] * c["head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads = c["linear_num_value_heads"]
    values = heads * c["linear_value_head_dim"]
    kernels = width * c["vocab_size"]
    flops = weights = 0
    for kind in _kinds(config):
        if kind == "linear_attention":
            kernels += width * (2 * keys + 3 * values + 2 * heads)
            kernels += c["linear_conv_kernel_dim"] * (2 * keys + values)
        else:
            kernels += width * (3 * attention + 2 * written)
        of_experts = _experts(
            tokens,
            width,
            c["num_experts"],
            c["num_experts_per_tok"],
            c["moe_intermediate_size"],
            c["shared_expert_intermediate_size"],
        )
        flops, weights = flops + of_experts[0], weights + of_experts[1]
    return flops + PRODUCT * tokens * kernels, weights + kernels * BF16


def _experts(tokens, width, experts, chosen, inner, shared):
    """Operations, and the bytes of the experts that a router with even chances asks."""
    asked = experts * (1 - (1 - chosen / experts) ** tokens)
    expert, beside = 3 * width * inner, 3 * width * shared + width
    flops = PRODUCT * tokens * (width * experts + chosen * expert + beside)
    return flops, width * experts * F32 + (asked * expert + beside) * BF16


def _recurrence(tokens, heads, matrix):
    """A token reads its head's state for its key, writes to it, and reads it for its query."""
    return 3 * PRODUCT * tokens * heads * matrix


def _scores(length, heads, dim):
    """Scores and sums of values over the keys that a token may see."""
    return 2 * PRODUCT * heads * dim * length * (length + 1) // 2
