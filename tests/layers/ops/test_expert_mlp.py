import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import expert_mlp
from qwen3_next.layers.ops.expert_mlp import api
from qwen3_next.layers.ops.grouped_matmul import api as products
from tests.support.paths import ROOT
from tests.support.running import BACKEND, assert_close, gradients, run

TOLERANCE = 2e-6
TOKENS, EXPERTS, CHOSEN, DIM, WIDTH = 40, 6, 2, 12, 5
ON_JAX = ["ragged_dot", "pallas"] if BACKEND == "jax" else []
ALL = ["tiled", "in_place", *ON_JAX]


def inputs(tokens=TOKENS, experts=EXPERTS, chosen=CHOSEN, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (tokens, DIM), (experts, DIM, 2 * WIDTH), (experts, WIDTH, DIM), (tokens, chosen)
    x, gate_up, down, weights = (rng.normal(size=s).astype("float32") for s in shapes)
    # Uneven: the last expert gets nothing, the first is the favourite.
    scores = rng.random((tokens, experts)) - 0.1 * np.arange(experts)
    scores[:, -1] = -1.0 if chosen < experts else 0.0
    routes = np.argsort(-scores, axis=-1)[:, :chosen].astype("int32")
    return [x, gate_up, down, routes, weights]


def activate(x, activation):
    if activation == "silu":
        return x / (1 + np.exp(-x))
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2.0)))


def oracle(x, gate_up, down, routes, weights, activation="silu"):
    output = np.zeros(x.shape)
    for n, k in np.ndindex(routes.shape):
        expert = routes[n, k]
        if 0 <= expert < len(gate_up):
            gate, up = np.split(np.asarray(x[n], np.float64) @ gate_up[expert], 2)
            output[n] += weights[n, k] * ((activate(gate, activation) * up) @ down[expert])
    return output


@functools.cache
def program(**options):
    return lambda *arrays: expert_mlp(*arrays, **options)[0]


@functools.cache
def counted(implementation):
    return lambda *arrays: tuple(expert_mlp(*arrays, implementation=implementation))


def gradients_by_autodiff(arrays, cotangent):
    """The plain sum over experts, differentiated by the backend: an independent gradient."""

    def dense(x, gate_up, down, routes, weights):
        gated = ops.einsum("nd,edf->nef", x, gate_up)
        gate, up = ops.split(gated, 2, axis=-1)
        each = ops.einsum("nef,efd->ned", ops.silu(gate) * up, down)
        chosen = ops.one_hot(routes, gate_up.shape[0], dtype="float32")
        return ops.einsum("ned,nke,nk->nd", each, chosen, weights)

    return gradients(dense, arrays, cotangent)


@pytest.mark.parametrize("implementation", ["tiled", "in_place"])
def test_every_mode_matches_the_oracle(compiled, implementation):
    arrays, function = inputs(), program(implementation=implementation)
    assert_close(run(function, *arrays, mode=compiled), oracle(*arrays), TOLERANCE)
    cotangent = inputs(seed=1)[0]
    found = gradients(function, arrays, cotangent, mode=compiled)
    for actual, expected in zip(found, gradients_by_autodiff(arrays, cotangent), strict=True):
        if expected is not None:
            assert_close(actual, expected, 5e-6)


@pytest.mark.portable
@pytest.mark.parametrize("implementation", ["tiled", "in_place"])
def test_the_portable_path_matches_the_oracle(implementation):
    arrays = inputs()
    found = run(program(implementation=implementation), *arrays)
    assert_close(found, oracle(*arrays), TOLERANCE)


@pytest.mark.parametrize("tokens, experts, chosen", [(1, 4, 2), (3, 64, 4), (300, 4, 1)])
def test_any_number_of_tokens_and_experts(tokens, experts, chosen):
    arrays = inputs(tokens, experts, chosen)
    assert_close(run(program(), *arrays), oracle(*arrays), TOLERANCE)


def test_gelu_has_its_own_derivative():
    arrays = inputs()
    step, cotangent = 1e-5, inputs(seed=1)[0]
    assert_close(
        run(program(activation="gelu"), *arrays), oracle(*arrays, activation="gelu"), TOLERANCE
    )
    found = gradients(program(activation="gelu"), arrays, cotangent)[0]
    direction = np.random.default_rng(2).choice([-1.0, 1.0], arrays[0].shape)
    x = arrays[0].astype("float64")
    ends = [
        (oracle(x + sign * step * direction, *arrays[1:], activation="gelu") * cotangent).sum()
        for sign in (1, -1)
    ]
    assert abs((found * direction).sum() - (ends[0] - ends[1]) / (2 * step)) < 1e-4


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("nowhere", [EXPERTS, -1, 2**31 - 1])
def test_the_tokens_of_every_expert_are_counted(nowhere, implementation):
    arrays = inputs()
    arrays[3][5] = nowhere
    output, tokens_per_expert = run(counted(implementation), *arrays)
    numbers = np.arange(EXPERTS)
    assert np.array_equal(tokens_per_expert, (arrays[3][..., None] == numbers).sum(axis=(0, 1)))
    assert not output[5].any()
    assert_close(output, oracle(*arrays), TOLERANCE)


@pytest.mark.parametrize("implementation", ALL)
def test_there_may_be_no_tokens(implementation):
    x, gate_up, down, routes, weights = inputs()
    arrays = x[:0], gate_up, down, routes[:0], weights[:0]
    output, tokens_per_expert = run(counted(implementation), *arrays)
    assert output.shape == (0, DIM)
    assert not tokens_per_expert.any()
    found = gradients(program(implementation=implementation), arrays, x[:0])
    assert [grad.shape for grad in found if grad is not None] == [
        array.shape for array in arrays if array.dtype == "float32"
    ]
    assert not found[1].any()


@pytest.mark.parametrize("pairs, chosen", [(2 * EXPERTS, "in_place"), (14, "tiled")])
def test_a_few_pairs_are_read_in_place_without_being_told(pairs, chosen):
    arrays, other = inputs(pairs // CHOSEN), {"in_place": "tiled", "tiled": "in_place"}[chosen]
    found = run(program(), *arrays)
    assert np.array_equal(found, run(program(implementation=chosen), *arrays))
    assert not np.array_equal(found, run(program(implementation=other), *arrays))


@pytest.mark.skipif(BACKEND != "jax", reason="the kernels are JAX's")
@pytest.mark.parametrize(
    "platform, spread, expected",
    [
        ("cpu", True, "tiled"),
        ("gpu", False, "pallas"),
        ("gpu", True, "pallas"),
        ("tpu", False, "ragged_dot"),
        ("tpu", True, "tiled"),
    ],
)
def test_a_gpu_runs_the_kernels_alone_or_as_one_of_several(monkeypatch, platform, spread, expected):
    for module in (api, products):
        monkeypatch.setattr(module, "platform", lambda: platform)
    assert api._pick(None, (300, 2), 200, spread) == expected


def test_pairs_in_place_are_taken_some_at_a_time(compiled):
    arrays = inputs(tokens=131)  # 262 pairs: not as many each time
    found = run(program(implementation="in_place"), *arrays, mode=compiled)
    assert_close(found, oracle(*arrays), TOLERANCE)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA tells JAX what a program holds")
def test_what_pairs_in_place_hold_does_not_grow_with_them():
    import jax

    def held(tokens):
        shapes = (tokens, 64), (512, 64, 1024), (512, 512, 64)
        floats = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        pairs = [jax.ShapeDtypeStruct((tokens, 2), dtype) for dtype in ("int32", "float32")]
        compiled = jax.jit(program(implementation="in_place")).lower(*floats, *pairs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(640) < 2 * held(64)


def test_in_place_padding_is_zero_whatever_the_experts_hold():
    x, gate_up, down, routes, weights = inputs(tokens=4)
    routes = np.full_like(routes, EXPERTS)
    nothing = np.full_like(gate_up, np.nan), np.full_like(down, np.nan)
    arrays = x, *nothing, routes, np.zeros_like(weights)
    assert not run(program(implementation="in_place"), *arrays).any()


def test_in_place_kernels_are_rounded_to_the_dtype_of_the_tokens():
    x, gate_up, down, routes, weights = inputs(tokens=4)

    def half(*arrays):
        x, *rest = arrays
        return ops.cast(
            program(implementation="in_place")(ops.cast(x, "bfloat16"), *rest), "float32"
        )

    found = run(half, x, gate_up, down, routes, weights)
    assert_close(found, oracle(x, gate_up, down, routes, weights), 2e-2)


@pytest.mark.parametrize("implementation", ["tiled", "in_place"])
def test_an_unused_expert_is_never_read(implementation):
    arrays, function = inputs(), program(implementation=implementation)
    poisoned = [x.copy() for x in arrays]
    poisoned[1][-1], poisoned[2][-1] = np.nan, np.nan
    assert np.array_equal(run(function, *poisoned), run(function, *arrays))
    found = gradients(function, poisoned, inputs(seed=1)[0])
    assert all(np.isfinite(grad).all() for grad in found if grad is not None)
    assert not found[1][-1].any()


@pytest.mark.parametrize("implementation", ON_JAX)
def test_implementations_agree(implementation):
    arrays, cotangent = inputs(), inputs(seed=1)[0]
    other = program(implementation=implementation)
    assert_close(run(other, *arrays), run(program(), *arrays), TOLERANCE)
    pairs = zip(
        gradients(other, arrays, cotangent), gradients(program(), arrays, cotangent), strict=True
    )
    for actual, expected in pairs:
        if expected is not None:
            assert_close(actual, expected, 5e-6)


def test_a_one_percent_error_in_one_expert_is_seen():
    arrays = inputs()
    wrong = [x.copy() for x in arrays]
    wrong[2][1] *= 1.01
    for implementation in ("tiled", "in_place"):
        with pytest.raises(AssertionError, match="off by"):
            found = run(program(implementation=implementation), *wrong)
            assert_close(found, oracle(*arrays), TOLERANCE)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("gate_up", 1, np.zeros((6, 11, 10), "float32")),
        ("down", 2, np.zeros((6, 4, 12), "float32")),
        ("experts", 3, np.zeros((7, 2), "int32")),
        ("weights", 4, np.zeros((40, 3), "float32")),
        ("x", 0, np.zeros((40, 12), "int32")),
        ("gate_up", 1, np.zeros((6, 12, 11), "float32")),
        ("experts", 3, np.zeros((40, 2), "float32")),
        ("experts", 3, np.zeros((40, 2), "bool")),
        ("experts", 3, np.zeros((40, 0), "int32")),
    ],
)
def test_an_error_names_the_argument(name, place, value):
    arrays = inputs()
    arrays[place] = value
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        expert_mlp(*arrays)


def test_an_expert_beyond_int32_is_none():
    x, gate_up, down, _, weights = inputs(tokens=2)
    far = np.array([[1, 2**32 + 1], [2, -(2**32)]])
    output, _ = expert_mlp(x, gate_up, down, far, weights)
    near = np.array([[1, EXPERTS], [2, EXPERTS]])
    assert_close(output, oracle(x, gate_up, down, near, weights), TOLERANCE)


@pytest.mark.parametrize("option", ["activation", "implementation"])
def test_an_unknown_choice_is_named(option):
    with pytest.raises(ValueError, match=f"{option}.*Received"):
        expert_mlp(*inputs(), **{option: "other"})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere the number of rows is known")
def test_in_place_needs_a_known_number_of_tokens():
    import tensorflow as tf

    x, gate_up, down, routes, weights = inputs()
    unknown = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in (x, routes, weights)]
    specs = unknown[0], gate_up, down, *unknown[1:]
    with pytest.raises(ValueError, match=r"known number of tokens.*Received"):
        tf.function(program(implementation="in_place")).get_concrete_function(*specs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere the number of rows is known")
@pytest.mark.parametrize("rows", [0, 1, TOKENS])
def test_a_number_of_tokens_that_only_the_run_tells_may_be_any(rows):
    import tensorflow as tf

    x, gate_up, down, routes, weights = inputs()

    @tf.function
    def step(x, routes, weights):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output, counts = expert_mlp(x, gate_up, down, routes, weights)
        return output, counts, tape.gradient(output, x)

    specs = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in (x, routes, weights)]
    given = x[:rows], routes[:rows], weights[:rows]
    output, counts, gradient = step.get_concrete_function(*specs)(*map(tf.constant, given))
    assert_close(output, oracle(given[0], gate_up, down, *given[1:]), TOLERANCE)
    assert int(sum(counts)) == rows * CHOSEN
    assert gradient.shape == (rows, DIM)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA tells JAX what a program holds")
def test_gradients_of_one_layer_are_held_at_a_time():
    """Were their buffers made of one constant, all would be there from the start."""
    import jax

    _, _, _, routes, weights = inputs(tokens=64, experts=32)
    x = np.ones((64, 64), "float32")
    layer = np.ones((32, 64, 128), "float32"), np.ones((32, 64, 64), "float32")

    def output(layers):
        rows = x
        for kernels in layers:
            rows = expert_mlp(rows, *kernels, routes, weights, implementation="tiled")[0]
        return rows.sum()

    def norms(layers):
        return jax.tree.map(lambda gradient: (gradient**2).sum(), jax.grad(output)(layers))

    held = jax.jit(norms).lower([layer] * 4).compile().memory_analysis().temp_size_in_bytes
    assert held < 2 * sum(kernel.nbytes for kernel in layer)


HELD_IN_A_LOOP = """
import jax
from qwen3_next.layers.ops import expert_mlp
from qwen3_next.layers.ops.expert_mlp import api
from qwen3_next.layers.ops.grouped_matmul import api as products

shapes = (2, 64), (64, 64, 128), (64, 64, 64), (2, 2)
floats = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
passes, routes = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((), (2, 2)))
for name in ("in_place", "tiled"):

    def loop(passes, routes, x, gate_up, down, weights):
        def step(i, x):
            kernels = gate_up, down
            return expert_mlp(x, *kernels, (routes + i) % 64, weights, implementation=name)[0]

        return jax.lax.fori_loop(0, passes, step, x)

    compiled = jax.jit(loop).lower(passes, routes, *floats).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(BACKEND != "jax", reason="XLA tells JAX what a program holds")
def test_a_loop_reads_bfloat16_kernels_where_they_lie():
    """XLA would slice a float32 copy of the stacks, or copy their bits before the loop: as it
    compiles for users, not for the suite."""
    found = subprocess.run(
        [sys.executable, "-c", HELD_IN_A_LOOP],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    smaller_stack = 2 * 64 * 64 * 64
    assert [int(held) < smaller_stack // 2 for held in found.stdout.split()] == [True, True]
