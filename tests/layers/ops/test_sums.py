import numpy as np
import pytest

from qwen3_next.layers.ops.sums import column_sums, row_sums, scaled
from tests.support.running import assert_close, gradients, run

X = np.random.default_rng(0).normal(size=(3, 5, 7)).astype("float32")
WEIGHT = np.random.default_rng(1).normal(size=7).astype("float32")


@pytest.mark.parametrize(
    "function, axis", [(row_sums, -1), (column_sums, (0, 1))], ids=["rows", "columns"]
)
def test_sums_are_sums(function, axis, compiled):
    assert_close(run(function, X, mode=compiled), np.float64(X).sum(axis), 1e-6)


def test_scaled_is_a_product_with_the_gradients_of_one(compiled):
    assert_close(run(scaled, X, WEIGHT, mode=compiled), X * WEIGHT, 1e-7)
    d_output = np.random.default_rng(2).normal(size=X.shape).astype("float32")
    d_x, d_weight = gradients(scaled, (X, WEIGHT), d_output, mode=compiled)
    assert_close(d_x, d_output * WEIGHT, 1e-7)
    assert_close(d_weight, np.float64(d_output * X).sum((0, 1)), 1e-6)
