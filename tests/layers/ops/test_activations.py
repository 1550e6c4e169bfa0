from math import erf

import numpy as np
import pytest

from qwen3_next.layers.ops.activations import ACTIVATIONS
from tests.support.running import assert_close, run

X = np.linspace(-6, 6, 101, dtype="float32")
ORACLES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2.0))),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_derivative_match_the_oracle(name):
    oracle, x, step = ORACLES[name], X.astype("float64"), 1e-5
    assert_close(run(ACTIVATIONS[name].function, X), oracle(x), 1e-6)
    expected = (oracle(x + step) - oracle(x - step)) / (2 * step)
    assert_close(run(ACTIVATIONS[name].derivative, X), expected, 1e-6)
