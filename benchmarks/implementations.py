"""Times what the ops choose between on a GPU, at the shapes of the published layers, with JAX.

    python -m benchmarks.implementations [--only PATTERN] [--small]

Every function is compiled first, several at a time, and then timed alone: the fastest of three
batches that are waited for at once. `--small` is for a try without a GPU.
"""

import argparse
import functools
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
# Weights and gradients take most of the memory, and JAX would take the rest beforehand.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from qwen3_next.layers.ops import attention, expert_mlp, gated_delta_rule, grouped_matmul
from qwen3_next.layers.ops.attention import pallas_attention
from qwen3_next.layers.ops.attention.attention_blocks import Keys, Queries
from qwen3_next.layers.ops.grouped_matmul import pallas_matmul
from qwen3_next.layers.ops.grouped_matmul.pallas_matmul import Blocks

DTYPE = "bfloat16"
BATCH = 10


class Shapes(NamedTuple):
    """Sizes of `80b_a3b`; `small` are for a try."""

    tokens: int = 8192
    width: int = 2048
    experts: int = 512
    chosen: int = 10
    inner: int = 512
    key_heads: int = 16
    value_heads: int = 32
    head: int = 128
    attention_heads: int = 16
    attention_groups: int = 2
    attention_head: int = 256


SMALL = Shapes(64, 32, 8, 2, 16, 1, 2, 16, 4, 2, 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", type=re.compile, help="names that have it")
    parser.add_argument("--small", action="store_true", help="small shapes")
    args = parser.parse_args()
    shapes = SMALL if args.small else Shapes()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {DTYPE}", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rooms = delta_rules, experts, products, attentions, attention_blocks
        cases = [case for room in rooms for case in room(shapes)]
        chosen = [(n, jax.jit(f), xs) for n, f, xs in cases if args.only.search(n)]
        runs = [(n, pool.submit(f.lower(*xs).compile), xs) for n, f, xs in chosen]
    for name, compiled, arrays in runs:
        print(f"| {name} | {milliseconds(compiled.result(), arrays):.3f} |", flush=True)


def milliseconds(compiled, arrays):
    def seconds():
        started = time.perf_counter()
        for _ in range(BATCH):
            found = None  # or two results would be held at once
            found = compiled(*arrays)
        jax.block_until_ready(found)
        return (time.perf_counter() - started) / BATCH

    return 1e3 * min(seconds() for _ in range(4))


def delta_rules(s):
    keys, values = (s.key_heads, s.head), (s.value_heads, s.head)
    query, key, value = (normal(i, 1, s.tokens, *x) for i, x in enumerate((keys, keys, values)))
    query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    shape = 1, s.tokens, s.value_heads
    decay, beta = (jax.random.uniform(jax.random.key(i), shape) for i in (3, 4))
    arrays = query, key, value, -0.1 * decay, beta
    for name in ("chunk_parallel", "pallas"):
        rule = with_options(lambda *xs, **how: gated_delta_rule(*xs, **how).output, name)
        yield f"delta rule, {name}, forward", rule, arrays
        yield f"delta rule, {name}, forward + backward", both(rule), arrays


def experts(s):
    gate_up = normal(5, s.experts, s.width, 2 * s.inner) * 0.02
    down = normal(6, s.experts, s.inner, s.width) * 0.02
    for tokens, names in ((s.tokens, ("pallas",)), (1, ("pallas", "in_place", "tiled"))):
        x, weights = normal(8, tokens, s.width), normal(9, tokens, s.chosen)
        run = functools.partial(_experts, routes=routes_of(s, tokens))
        for name in names:
            what, mlp = f"experts, tokens: {tokens}, {name}", with_options(run, name)
            yield f"{what}, forward", mlp, (x, gate_up, down, weights)
            if tokens > 1:
                yield f"{what}, forward + backward", both(mlp), (x, gate_up, down, weights)


def _experts(x, gate_up, down, weights, routes, implementation):
    return expert_mlp(x, gate_up, down, routes, weights, implementation=implementation)[0]


def products(s):
    """Of rows that are spread over the experts by chance, in blocks of several sizes."""
    rows, widths = s.tokens * s.chosen, (s.width, s.inner, 2 * s.inner)
    sizes = jnp.bincount(routes_of(s, s.tokens).reshape(-1), length=s.experts).astype("int32")
    x, gated, end = (normal(10 + i, rows, width) for i, width in enumerate(widths))
    up, down = normal(5, s.experts, s.width, 2 * s.inner), normal(6, s.experts, s.inner, s.width)
    for blocks in (
        Blocks(64, 128, 64, 4, 4),
        Blocks(64, 256, 64, 8, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 4, 4),
        Blocks(128, 256, 64, 8, 3),
    ):
        times = functools.partial(pallas_matmul.times_weights, blocks=blocks)
        ahead, back = (functools.partial(times, turned=turned) for turned in (False, True))
        yield f"rows times gate and up, {tuple(blocks)}", ahead, (x, up, sizes)
        yield f"rows times down, {tuple(blocks)}", ahead, (gated, down, sizes)
        yield f"gradient of rows, {tuple(blocks)}", back, (end, up, sizes)
    for blocks in (
        Blocks(128, 128, 32, 4, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(64, 128, 32, 4, 4),
    ):
        kernel = functools.partial(pallas_matmul.of_weights, dtype=DTYPE, blocks=blocks)
        yield f"gradient of gate and up, {tuple(blocks)}", kernel, (x, end, sizes)
    few = min(32, s.experts)
    each = min(128, rows // few)
    arrays = x[: few * each], up[:few], jnp.full((few,), each, "int32")
    for name in ("ragged_dot", "pallas"):
        yield f"{few} groups of {each} rows, {name}", with_options(grouped_matmul, name), arrays


def attentions(s):
    arrays, limits = queries_and_keys(s), jnp.arange(s.tokens, dtype="int32")[None]
    for name in ("fused", "pallas"):
        run = with_options(attention, name)
        yield f"attention, {name}, forward", run, arrays
        yield f"attention, {name}, forward + backward", both(run), arrays
    segments = limits // -(-s.tokens // 8)
    packed = functools.partial(attention, query_segments=segments, key_segments=segments)
    yield "attention, 8 sequences packed, forward", packed, arrays
    yield "attention, 8 sequences packed, forward + backward", both(packed), arrays
    both_ways = "chunked", "pallas"
    for tokens, names in (
        (s.tokens, both_ways[1:]),
        (64, both_ways),
        (4, both_ways),
        (1, both_ways[:1]),
    ):
        given = arrays[0][:, -tokens:], *arrays[1:], limits[:, -tokens:]
        for name in names:
            run = with_options(_in_a_cache, name)
            yield f"attention of {tokens} to {s.tokens} in a cache, {name}", run, given


def _in_a_cache(query, key, value, limits, implementation):
    return attention(query, key, value, limits=limits, implementation=implementation)


def attention_blocks(s):
    """Each of the three kernels of attention in blocks of several sizes."""
    arrays = queries_and_keys(s)
    lse = jnp.full((1, s.attention_heads, s.tokens), 9.0)
    for what, choose, sizes in (
        ("forward", None, ((128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 2), (128, 32, 8, 3))),
        ("gradient of queries", slice(1), ((64, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2))),
        ("gradient of keys", slice(1, 3), ((64, 64, 8, 1), (64, 64, 8, 2), (32, 32, 4, 2))),
    ):
        for size in sizes:
            name = f"attention, {what}, {size}"
            run = functools.partial(_in_kernel, choose, pallas_attention.Blocks(*size))
            given = arrays if choose is None else [*arrays, arrays[0], lse]
            yield name, run, given


def _in_kernel(choose, blocks, query, key, value, output=None, lse=None):
    """The forward pass, or those of the gradients that are chosen: the others are left out."""
    segments = jnp.zeros(query.shape[:2], "int32")
    limits = jnp.arange(query.shape[1], dtype="int32")[None]
    queries = Queries(query, limits, segments)
    keys = Keys(key, value, jnp.ones(segments.shape, bool), segments)
    how = pallas_attention.Sizes(blocks, blocks, blocks), query.shape[3] ** -0.5
    if choose is None:
        return pallas_attention.forward(queries, keys, *how)
    return pallas_attention.backward(queries, keys, output, lse, output, *how)[choose]


def queries_and_keys(s):
    heads = s.attention_heads, s.attention_groups, s.attention_groups
    return [normal(i, 1, s.tokens, n, s.attention_head) for i, n in enumerate(heads)]


def routes_of(s, tokens):
    return jax.lax.top_k(normal(7, tokens, s.experts), s.chosen)[1]


def with_options(function, implementation):
    return functools.partial(function, implementation=implementation)


def both(function):
    """Output and the gradients of all arrays, from a gradient of the output like it."""

    def run(*arrays):
        output, pull = jax.vjp(function, *arrays)
        return output, pull(output)

    return run


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, DTYPE)


if __name__ == "__main__":
    main()
