"""Ops on eight devices: the numbers of one, and nothing sent that need not be."""

import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next import Qwen3NextConfig
from qwen3_next.layers.ops import (
    attention,
    causal_conv1d,
    expert_mlp,
    gated_delta_rule,
    linear_cross_entropy,
)
from qwen3_next.layers.ops.backend.sharding import devices, spec
from qwen3_next.models.weight_table import weight_table
from qwen3_next.scale.collectives import collectives, largest_arrays
from qwen3_next.scale.sharding_rules import sharding_of
from tests.support.devices import MESHES, distribution_of, eight_devices
from tests.support.running import assert_close

pytestmark = eight_devices
ROWS, HEADS, DATA, EXPERTS = ("data", "expert"), ("tensor",), ("data",), ("expert", "tensor")
MESH = "data=2,expert=2,tensor=2"
B, T, H, D, E, F, V = 4, 16, 4, 8, 8, 12, 40


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def delta_rule(implementation):
    shapes = (B, T, 2, D), (B, T, 2, D), (B, T, H, D), (B, T, H), (B, T, H)
    query, key, value, decay, beta = (normal(*s, seed=i) for i, s in enumerate(shapes))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    arrays = query, key, value, -np.abs(decay), 1 / (1 + np.exp(-beta))

    def run(*arrays):
        return gated_delta_rule(*arrays, chunk_size=8, implementation=implementation)[0]

    by_head = ROWS, (), HEADS
    return run, arrays, (by_head,) * 5, by_head, set()


def convolution():
    mask = np.arange(T) < np.array([16, 9, 12, 16])[:, None]

    def run(x, kernel):
        return causal_conv1d(x, kernel, padding_mask=ops.convert_to_tensor(mask)).output

    arrays = normal(B, T, D), normal(4, D)
    layouts = (ROWS, (), HEADS), ((), HEADS)
    return run, arrays, layouts, (ROWS, (), HEADS), {("all-reduce", ROWS)}


def causal_attention(implementation):
    arrays = normal(B, T, H, D), normal(B, T, 2, D, seed=1), normal(B, T, 2, D, seed=2)
    mask = np.arange(T) < np.array([16, 9, 12, 16])[:, None]

    def run(*arrays):
        mask_of_keys = ops.convert_to_tensor(mask)
        return attention(*arrays, key_mask=mask_of_keys, implementation=implementation)

    by_head = ROWS, (), HEADS
    return run, arrays, (by_head,) * 3, by_head, set()


def experts(implementation):
    routes = np.argsort(normal(B * T, E), axis=-1)[:, :2].astype("int32")
    routes[3] = E  # no expert at all

    def run(x, gate_up, down, weights):
        chosen = ops.convert_to_tensor(routes)
        return expert_mlp(x, gate_up, down, chosen, weights, implementation=implementation)[0]

    arrays = normal(B * T, D), normal(E, D, 2 * F), normal(E, F, D), normal(B * T, 2)
    layouts = (ROWS,), (EXPERTS,), (EXPERTS,), (ROWS,)
    # Tokens to the experts and back, sums over the devices that share them, gradients over data.
    sent = {(kind, ("expert",)) for kind in ("all-gather", "reduce-scatter")}
    return run, arrays, layouts, (ROWS,), {*sent, ("all-reduce", HEADS), ("all-reduce", DATA)}


def loss(chunk_rows):
    labels = np.random.default_rng(0).integers(0, V, B * T).astype("int32")
    labels[::5] = -100

    def run(hidden, kernel):
        return linear_cross_entropy(
            hidden, kernel, ops.convert_to_tensor(labels), chunk_rows=chunk_rows
        )

    layouts = (ROWS,), ((), HEADS)
    sent = {("all-reduce", HEADS), ("all-reduce", ROWS)}
    return run, (normal(B * T, D), normal(D, V)), layouts, (ROWS,), sent


CASES = {
    "chunked delta rule": functools.partial(delta_rule, "chunked"),
    "parallel delta rule": functools.partial(delta_rule, "chunk_parallel"),
    "delta rule in a kernel": functools.partial(delta_rule, "pallas"),
    "convolution": convolution,
    "attention": functools.partial(causal_attention, "chunked"),
    "attention in kernels": functools.partial(causal_attention, "pallas"),
    "experts": functools.partial(experts, "tiled"),
    "experts in kernels": functools.partial(experts, "pallas"),
    "loss": functools.partial(loss, 8),
    "loss with logits that are kept": functools.partial(loss, None),
}


def with_gradients(run, arrays, cotangent):
    import jax

    output, backward = jax.vjp(run, *arrays)
    return output, backward(cotangent)


def placed(array, layout):
    import jax

    return jax.device_put(array, jax.sharding.NamedSharding(devices().mesh, spec(*layout)))


@pytest.mark.parametrize("name", CASES)
def test_an_op_gives_the_numbers_of_one_device_and_sends_what_it_must(name):
    import jax

    run, arrays, layouts, output, sent = CASES[name]()
    cotangent = normal(*np.shape(jax.eval_shape(run, *arrays)), seed=9)
    expected = with_gradients(run, arrays, cotangent)
    with distribution_of(MESH) as parallel:
        arrays = [placed(*pair) for pair in zip(arrays, layouts, strict=True)]
        step = jax.jit(functools.partial(with_gradients, run)).lower(
            arrays, placed(cotangent, output)
        )
        program = step.compile()
        found = program(arrays, placed(cotangent, output))
        for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_close(actual, wanted, 2e-6)
        rows = collectives(program.as_text(), parallel.sizes)
    large = {(row.kind, row.axes) for row in rows if row.largest > 64}
    assert large <= sent


def test_no_device_has_an_expert_of_another_or_a_logit_for_each_word():
    import jax

    for name, whole in (("experts", (E, D, 2 * F)), ("loss", (B * T, V))):
        run, arrays, layouts, output, _ = CASES[name]()
        with distribution_of(MESH):
            arrays = [placed(*pair) for pair in zip(arrays, layouts, strict=True)]
            cotangent = placed(np.ones(np.shape(jax.eval_shape(run, *arrays)), "float32"), output)
            step = jax.jit(functools.partial(with_gradients, run)).lower(arrays, cotangent)
            sizes = largest_arrays(step.compile().as_text())
        # The same as a search for the shape: an array may have been flattened.
        assert max(sizes.values()) < 4 * np.prod(whole)


@pytest.mark.parametrize("implementation", ["tiled", "pallas"])
def test_rows_and_experts_that_do_not_divide_are_not_spread(implementation):
    _, (x, gate_up, down, weights), *_ = experts("tiled")
    routes = np.argsort(normal(5, 6), axis=-1)[:, :2].astype("int32")
    given = x[:5], gate_up[:6], down[:6], routes, weights[:5]
    expected = expert_mlp(*given)
    with distribution_of("expert=4"):
        found = expert_mlp(*given, implementation=implementation)
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual, wanted, 2e-6)


def test_not_every_implementation_of_the_experts_is_spread():
    _, (x, gate_up, down, weights), *_ = experts("tiled")
    routes = np.zeros((B * T, 2), "int32")
    with distribution_of("expert=4"), pytest.raises(ValueError, match="ragged_dot"):
        expert_mlp(x, gate_up, down, routes, weights, implementation="ragged_dot")


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("mesh", [*MESHES, "data=4,tensor=2", "expert=4,tensor=2"])
def test_ops_take_weights_as_they_lie(mesh, fsdp):
    config = Qwen3NextConfig.from_variant("80b_a3b", num_layers=1)
    rows = {row.path.rsplit("/", 1)[-1]: row for row in weight_table(config)}
    head = next(row for row in weight_table(config) if row.path == "lm_head/kernel")
    with distribution_of(mesh, fsdp=fsdp) as parallel:
        found = devices()
        experts, words = found.experts(config.num_experts), found.heads(config.vocab_size)
        width, spread = config.hidden_size, found.rows(64)
        taken = {
            rows["gate_up"]: (experts, found.columns(width, experts, spread), ()),
            rows["down"]: (experts, (), found.columns(width, experts, spread)),
            head: (found.columns(width, words, spread), words),
        }
        for row, axes in taken.items():
            lies = sharding_of(row, parallel.sizes, fsdp).axes
            assert spec(*axes) == jax_spec(lies), row.path


def jax_spec(axes):
    import jax

    return jax.sharding.PartitionSpec(*axes)
