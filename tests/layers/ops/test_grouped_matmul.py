import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import grouped_matmul
from qwen3_next.layers.ops.backend import platform as platform_module
from qwen3_next.layers.ops.backend.loops import get_rows, set_rows
from qwen3_next.layers.ops.grouped_matmul import api
from qwen3_next.layers.ops.grouped_matmul.tiles import for_each_tile, plan_tiles, tile_sizes
from tests.support import oracles
from tests.support.pretended_gpu import lowered_for_gpu
from tests.support.running import BACKEND, assert_close, assert_slopes, gradients, run, to_numpy

TOLERANCE = 2e-6
ROWS, DIM, WIDTH = 50, 12, 7
SIZES = {
    "even": [10, 10, 10, 10, 10],
    "uneven": [1, 30, 4, 12, 3],
    "empty first": [0, 0, 20, 25, 5],
    "empty last": [20, 25, 5, 0, 0],
    "empty between": [20, 0, 25, 0, 5],
    "all in the first": [50, 0, 0, 0, 0],
    "all in the last": [0, 0, 0, 0, 50],
}


ALL = ["tiled", *(["pallas"] if BACKEND == "jax" else [])]


@functools.cache
def product(implementation):
    return lambda *arrays: grouped_matmul(*arrays, implementation=implementation)


def inputs(sizes, rows=None, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes, "int32")
    rows = rng.normal(size=(sizes.sum() if rows is None else rows, DIM))
    weights = rng.normal(size=(len(sizes), DIM, WIDTH))
    return [rows.astype("float32"), weights.astype("float32"), sizes]


def scattered(groups, rows, seed=3):
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows, rng.dirichlet(np.full(groups, 0.2)))


def cotangent_of(arrays):
    shape = len(arrays[0]), WIDTH
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def assert_gradients(implementation, arrays):
    cotangent = cotangent_of(arrays)
    found = gradients(product(implementation), arrays, cotangent)
    assert_slopes(oracles.grouped_matmul, arrays, cotangent, found)


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = inputs(SIZES["uneven"])
    output = run(grouped_matmul, *arrays, mode=compiled)
    assert_close(output, oracles.grouped_matmul(*arrays), TOLERANCE)
    cotangent = cotangent_of(arrays)
    grads = gradients(grouped_matmul, arrays, cotangent, mode=compiled)
    assert_slopes(oracles.grouped_matmul, arrays, cotangent, grads)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("sizes", SIZES)
def test_any_group_may_be_empty_or_full(implementation, sizes):
    arrays = inputs(SIZES[sizes])
    assert_close(run(product(implementation), *arrays), oracles.grouped_matmul(*arrays), TOLERANCE)
    assert_gradients(implementation, arrays)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("groups, rows", [(1, 1), (1, 200), (64, 200), (512, 20), (512, 1)])
def test_any_number_of_groups_and_rows(implementation, groups, rows):
    arrays = inputs(scattered(groups, rows))
    assert_close(run(product(implementation), *arrays), oracles.grouped_matmul(*arrays), TOLERANCE)


@pytest.mark.skipif(BACKEND != "jax", reason="an operation of JAX")
def test_implementations_agree():
    def ragged(*arrays):
        return grouped_matmul(*arrays, implementation="ragged_dot")

    arrays = inputs(SIZES["uneven"], rows=53)
    assert_close(run(ragged, *arrays), run(grouped_matmul, *arrays), TOLERANCE)


@pytest.mark.skipif(BACKEND != "jax", reason="the kernels are JAX's")
@pytest.mark.parametrize("rows", [81_920, 10])
def test_a_product_and_its_gradients_are_three_kernels_on_a_gpu(rows):
    import jax

    def loss(*arrays):
        return grouped_matmul(*arrays, implementation="pallas").astype("float32").sum()

    shapes = [((rows, 2048), "bfloat16"), ((512, 2048, 1024), "bfloat16"), ((512,), "int32")]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    _, program = lowered_for_gpu(jax.value_and_grad(loss, argnums=(0, 1)), *arrays)
    assert program.count("gpu.triton") == 3
    assert "stablehlo.while" not in program


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there are no kernels")
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("spread", [False, True])
def test_the_kernels_are_what_a_gpu_runs_unless_it_is_one_of_several(monkeypatch, platform, spread):
    monkeypatch.setattr(api, "platform", lambda: platform)
    monkeypatch.setattr(api, "devices", lambda: "some" if spread else None)
    assert (api.pick(None, 10) == "pallas") == (platform == "gpu" and not spread)
    assert api.pick(None, None) != "pallas"


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    arrays = inputs(SIZES["even"])
    if BACKEND != "jax":
        with pytest.raises(ValueError, match=r"implementation='pallas'.*Received: backend="):
            grouped_matmul(*arrays, implementation="pallas")
        return
    with pytest.raises(ValueError, match="known number of rows"):
        api.pick("pallas", None)
    with monkeypatch.context() as context:
        context.setattr(platform_module, "platform", lambda: "tpu")
        with pytest.raises(ValueError, match=r"implementation='pallas'.*Received: a TPU"):
            api.pick("pallas", 10)
    monkeypatch.setattr(platform_module, "has_pallas", lambda: False)
    with pytest.raises(ValueError, match=r"jax.experimental.pallas.triton.*Received: jax"):
        grouped_matmul(*arrays, implementation="pallas")


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"implementation.*Received"):
        grouped_matmul(*inputs(SIZES["even"]), implementation="quick")


@pytest.mark.parametrize("implementation", ALL)
def test_rows_behind_the_last_group_yield_zeros(implementation):
    arrays = inputs(SIZES["uneven"], rows=53)
    output = run(product(implementation), *arrays)
    assert_close(output, oracles.grouped_matmul(*arrays), TOLERANCE)


@pytest.mark.parametrize("implementation", ALL)
def test_rows_behind_the_last_group_carry_no_gradient(implementation):
    arrays = inputs(SIZES["uneven"], rows=53)
    assert_gradients(implementation, arrays)


@pytest.mark.parametrize("implementation", ALL)
def test_gradients_with_more_groups_than_rows(implementation):
    arrays = inputs(scattered(512, 20))
    assert_gradients(implementation, arrays)


@pytest.mark.parametrize("implementation", ALL)
def test_an_unused_group_is_never_read(implementation):
    rows, weights, sizes = inputs(SIZES["empty between"])
    poisoned = weights.copy()
    poisoned[sizes == 0] = np.nan
    output = run(product(implementation), rows, poisoned, sizes)
    assert np.array_equal(output, run(product(implementation), rows, weights, sizes))
    cotangent = cotangent_of([rows])
    d_rows, d_weights, _ = gradients(product(implementation), (rows, poisoned, sizes), cotangent)
    assert np.isfinite(d_rows).all()
    assert not d_weights[sizes == 0].any()


@pytest.mark.parametrize("groups", [1, 8, 64, 512])
def test_work_follows_the_rows_and_the_groups_in_use(groups):
    rows = 200
    sizes = scattered(groups, rows)
    choices = tile_sizes(rows, groups)
    plan = plan_tiles(rows, ops.convert_to_tensor(sizes.astype("int32")), choices)

    def count(tile, carry):
        covered, number = carry
        own = ops.cast(tile.own, "int32")
        covered = set_rows(covered, tile.start, get_rows(covered, tile.start, tile.size) + own)
        return covered, number + 1

    covered = ops.zeros((rows + choices[-1],), "int32")
    covered, number = to_numpy(for_each_tile(plan, count, (covered, ops.zeros((), "int32"))))
    assert (covered[:rows] == 1).all()
    assert int(number) <= rows // choices[-1] + (sizes > 0).sum()


def test_a_plan_lists_full_tiles_and_then_last_tiles_by_size():
    plan = to_numpy(
        plan_tiles(24, ops.convert_to_tensor(np.array([5, 0, 19], "int32")), (8, 16))[1:]
    )
    expected = [5, 5, 24], 1, [2], [0, 5, 5], [0, 2, 1], [0, 2, 2], [0, 5, 21]
    assert [x.tolist() for x in plan] == list(expected)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
def test_no_tensor_holds_all_groups_times_all_rows():
    import jax

    groups, rows, dim, width = 256, 512, 64, 64
    shapes = [((rows, dim), "float32"), ((groups, dim, width), "float32"), ((groups,), "int32")]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory = jax.jit(grouped_matmul).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < groups * rows * width * 4 / 20


@pytest.mark.parametrize("implementation", ALL)
def test_half_precision_rows_give_half_precision_outputs(implementation):
    rows, weights, sizes = inputs(SIZES["uneven"])
    half = ops.cast(rows, "bfloat16")
    half_weights = ops.cast(weights, "bfloat16")
    output = product(implementation)(half, half_weights, ops.convert_to_tensor(sizes))
    assert output.dtype == half.dtype
    assert_close(to_numpy(output), oracles.grouped_matmul(rows, weights, sizes), 2e-2)


@pytest.mark.parametrize("implementation", ALL)
def test_a_one_percent_error_in_one_group_is_seen(implementation):
    rows, weights, sizes = inputs(SIZES["uneven"])
    wrong = weights.copy()
    wrong[2] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        output = run(product(implementation), rows, wrong, sizes)
        assert_close(output, oracles.grouped_matmul(rows, weights, sizes), TOLERANCE)


@pytest.mark.parametrize(
    "name, place, shape",
    [
        ("weights", 0, (50, 11)),
        ("rows", 0, (2, 50, 12)),
        ("weights", 1, (12, 7)),
        ("group_sizes", 2, (4,)),
    ],
)
def test_an_error_names_the_argument(name, place, shape):
    arrays = inputs(SIZES["even"])
    arrays[place] = np.zeros(shape, arrays[place].dtype)
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        grouped_matmul(*arrays)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (np.ones(5, "float32"), "must be integers"),
        ([10, 10, 10, 10, -1], "must be at least 0 and sum to"),
        ([10, 10, 10, 10, 11], "must be at least 0 and sum to"),
        (np.full(5, 2**32), "must fit in int32"),
    ],
)
def test_group_sizes_are_those_of_the_rows(sizes, message):
    rows, weights, _ = inputs(SIZES["even"])
    with pytest.raises(ValueError, match=f"`group_sizes` {message}.*Received"):
        grouped_matmul(rows, weights, sizes)
    with pytest.raises(ValueError, match=r"`rows` must be floats.*Received"):
        grouped_matmul(rows.astype("int32"), weights, SIZES["even"])
