"""Products of single rows, and the projections that are made of them."""

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import row_product
from qwen3_next.layers.projection import HeadDense, RowDense, dense, from_heads, to_heads
from tests.support.running import assert_close, gradients, run, to_numpy

TOLERANCE = 2e-6
LARGE = 256  # a square kernel of so many rows is large enough to pay


def inputs(inner=40, outer=24, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (1, inner), (inner, outer)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.portable
@pytest.mark.parametrize("inner", [1, 7, 40, 64])
def test_a_product_matches_the_oracle_for_any_number_of_rows(inner):
    row, kernel = inputs(inner)
    found = run(row_product.multiply_row, row, kernel)
    assert_close(found, row.astype("float64") @ kernel.astype("float64"), TOLERANCE)


def test_every_mode_differentiates_by_row_and_kernel(compiled):
    row, kernel = inputs()
    cotangent = inputs(seed=1)[1][:1]
    found = run(row_product.multiply_row, row, kernel, mode=compiled)
    assert_close(found, row.astype("float64") @ kernel, TOLERANCE)
    by_row, by_kernel = gradients(row_product.multiply_row, [row, kernel], cotangent, compiled)
    assert_close(by_row, cotangent.astype("float64") @ kernel.T, TOLERANCE)
    assert_close(by_kernel, row.astype("float64").T @ cotangent, TOLERANCE)


def test_a_one_percent_error_in_one_row_of_the_kernel_is_seen():
    row, kernel = inputs()
    wrong = kernel.copy()
    wrong[33] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        found = run(row_product.multiply_row, row, wrong)
        assert_close(found, row.astype("float64") @ kernel, TOLERANCE)


def test_sums_are_float32_where_the_factors_are_bfloat16():
    def half(row, kernel):
        product = row_product.multiply_row(ops.cast(row, "bfloat16"), ops.cast(kernel, "bfloat16"))
        return ops.cast(product, "float32")

    row, kernel = np.ones((1, 4096), "float32"), np.ones((4096, 16), "float32")
    assert np.array_equal(run(half, row, kernel), np.full((1, 16), 4096.0))


@pytest.mark.portable
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_kernels_are_rounded_to_the_dtype_of_the_rows(stored, computed):
    """Kernel 2 holds NaN: nothing of it may be read."""
    rng = np.random.default_rng(3)
    rows, kernels = rng.normal(size=(3, 40)), rng.normal(size=(4, 40, 24))
    kernels[2] = np.nan

    def rounded(x, *dtypes):
        for dtype in dtypes:
            x = ops.cast(x, dtype)
        return x

    def function(rows, kernels, index):
        args = rounded(rows, computed), rounded(kernels, stored), index
        return row_product.sum_of_blocks(row_product.partial_products(*args))

    arrays = rows.astype("float32"), kernels.astype("float32")
    found = run(function, *arrays, np.array([3, 0, 3], "int32"))
    rows = to_numpy(rounded(arrays[0], computed, "float32")).astype("float64")
    kernels = to_numpy(rounded(arrays[1], stored, computed, "float32")).astype("float64")
    assert_close(found, np.einsum("pi,pio->po", rows, kernels[[3, 0, 3]]), TOLERANCE)


@pytest.mark.parametrize("rows", [(1,), (1, 1)])
def test_large_kernels_pay_for_one_row_alone(rows):
    kernel = ops.zeros((LARGE, LARGE))
    assert row_product.pays(rows, kernel)
    assert not row_product.pays(rows, kernel[1:])
    assert not row_product.pays((*rows, 2), kernel)
    assert not row_product.pays((*rows, None), kernel)
    assert row_product.pays(rows, ops.cast(kernel, "bfloat16"))


@pytest.mark.portable
@pytest.mark.parametrize("places", [(3,), (2, 4)])
def test_a_kernel_turned_round_gives_the_same_products(places):
    rng = np.random.default_rng(4)
    rows, kernel = (rng.normal(size=s).astype("float32") for s in ((*places, 40), (40, 24)))
    found = run(row_product.multiply_turned, rows, kernel.T.copy())
    assert_close(found, rows.astype("float64") @ kernel, TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "products", "pays"),
    [
        (3, 16, True),
        (32, 16, True),
        (2, 16, False),
        (33, 16, False),
        (4, 15, False),
        (4, None, True),
        (2, None, False),
    ],
)
def test_large_kernels_are_turned_round_for_a_few_rows_and_many_products(rows, products, pays):
    kernel = np.empty((2**10, 2**13), "float32")
    assert row_product.pays_to_turn(rows, kernel, products) == pays
    assert not row_product.pays_to_turn(rows, kernel[1:], products)


def projections():
    return {
        "dense": (dense(LARGE, 0.1, "dense", "float32"), (LARGE,)),
        "to_heads": (to_heads(8, LARGE // 8, 0.1, "to", "float32"), (LARGE,)),
        "from_heads": (from_heads(LARGE, 0.1, "from", "float32"), (8, LARGE // 8)),
    }


@pytest.mark.parametrize("kind", ["dense", "to_heads", "from_heads"])
def test_a_projection_of_one_token_is_that_of_several(kind, monkeypatch):
    layer, width = projections()[kind]
    layer.build((None, None, *width))
    used, product = [], row_product.multiply_row
    monkeypatch.setattr(row_product, "multiply_row", lambda *xs: used.append(1) or product(*xs))
    x = np.random.default_rng(0).normal(size=(1, 2, *width)).astype("float32")
    both, one = run(layer, x), run(lambda x: layer(x), x[:, :1])
    assert used
    assert one.shape == both[:, :1].shape == (1, 1, *layer.compute_output_shape(x.shape)[2:])
    assert_close(one, both[:, :1], TOLERANCE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RowDense(LARGE, activation="relu"),
        lambda: RowDense(LARGE, bias_initializer="ones"),
        lambda: HeadDense("btd,dhk->bthk", (None, 8, LARGE // 8), activation="relu"),
        lambda: HeadDense("btd,dhk->bthk", (None, 8, LARGE // 8), bias_axes="k"),
    ],
)
def test_a_bias_and_an_activation_count_for_one_token_too(make):
    layer = make()
    layer.build((None, None, LARGE))
    if layer.bias is not None:
        layer.bias.assign(ops.ones(layer.bias.shape))
    x = np.random.default_rng(0).normal(size=(1, 2, LARGE)).astype("float32")
    assert_close(to_numpy(layer(x[:, :1])), to_numpy(layer(x))[:, :1], TOLERANCE)
