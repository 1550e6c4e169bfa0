"""The libraries that are measured; each module offers the same tasks as functions.

    prefill(config, batch, length)        all logits of a forward pass
    train(config, batch, length)          loss, gradients and an AdamW step
    read_prompts(config, lengths)         prompts of several lengths, one new token behind each
    decode(config, batch, length, new)    greedy generation behind a short prompt
    first_predict(config, batch, length)  `predict`, `fit` for a step and `generate`, as a user
    first_fit(config, batch, length)      calls them: what counts is the first call
    first_generate(config, batch, length, new)
    products(config, batch, length, backward)  what a model multiplies with its kernels, alone
    step_on_devices(config, mesh, fsdp, batch, length)  a train step on simulated devices, compiled
    delta_rule(length, heads, dim), delta_rule_grad(...), moe(...), moe_grad(...), loss(...)

Each returns a `Work`. For the rows of a GPU there are modules `..._gpu`, whose tasks are

    prefill, gradients(config, batch, length), decode(config, batch, length, new)
    delta_rule(length, key_heads, heads, dim, backward)
    attention(length, heads, groups, dim, backward)
    moe(tokens, width, experts, chosen, inner, shared, backward)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Work(NamedTuple):
    """`run()` does the work once and waits for it; `units` it counts for (tokens, in decoding).

    On a GPU `run(times)` does it as often and waits once, so that the program that starts the work
    is not what is measured.

    `temp_bytes()` is what the compiler says the program needs besides inputs and outputs,
    `error()` how far its result is from the float64 oracle, relative to the largest entry, and
    `notes()` a dict of other figures.
    """

    run: Callable
    units: int = 1
    temp_bytes: Callable | None = None
    error: Callable | None = None
    notes: Callable | None = None


def token_ids(config, batch, length):
    return np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length), "int32")


def delta_rule_inputs(length, heads, dim):
    """Query, key, value `(1, T, H, dim)`, log decay and beta `(1, T, H)`, float32."""
    rng = np.random.default_rng(0)
    query, key = (_unit(rng.standard_normal((1, length, heads, dim))) for _ in range(2))
    value = rng.standard_normal((1, length, heads, dim))
    log_decay = -0.1 * rng.random((1, length, heads))
    beta = rng.random((1, length, heads))
    return [x.astype("float32") for x in (query, key, value, log_decay, beta)]


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def moe_inputs(tokens, width, experts, chosen, inner):
    """Rows, router, stacked gate and up, stacked down, float32."""
    rng = np.random.default_rng(0)
    shapes = (tokens, width), (width, experts), (experts, width, 2 * inner), (experts, inner, width)
    return [
        (rng.standard_normal(s) * scale).astype("float32")
        for s, scale in zip(shapes, (1, 0.1, 0.04, 0.04))
    ]


def kernel_products(config, batch, length):
    """What each kernel multiplies, `(rows, kernel)`: of all tokens, or of an expert's even share.

    Without attention's scores and the delta rule, which have no kernels, and without the small
    kernels of routers, gates and decay rates.
    """
    c, rows = config, batch * length
    width, attention = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    written = c["num_key_value_heads"] * c["head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = c["linear_num_value_heads"] * c["linear_value_head_dim"]
    inner, shared = c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    share = rows * c["num_experts_per_tok"] // c["num_experts"]
    expert = (share, width, 2 * inner), (share, inner, width)
    moe = [*expert * c["num_experts"], (rows, width, 2 * shared), (rows, shared, width)]
    shapes = [(rows, width, c["vocab_size"])]
    for layer in range(c["num_layers"]):
        if (layer + 1) % c["full_attention_interval"]:
            shapes += [(rows, width, 2 * keys + 2 * values), (rows, values, width)]
        else:
            shapes += [(rows, width, 2 * attention + 2 * written), (rows, attention, width)]
        shapes += moe
    rng = np.random.default_rng(0)
    for m, k, n in shapes:
        yield tuple(rng.standard_normal(s, "float32") for s in ((m, k), (k, n)))


def output_gradient(rows, kernel):
    return np.random.default_rng(0).standard_normal((len(rows), kernel.shape[1]), "float32")


def relative_error(value, reference):
    value = np.asarray(value, np.float64)
    return float(np.abs(value - reference).max() / np.abs(reference).max())
