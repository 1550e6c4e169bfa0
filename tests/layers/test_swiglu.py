"""The gated feed-forward network."""

import math

import numpy as np
import pytest

from qwen3_next import layers
from tests.support.layers import tokens
from tests.support.running import assert_close, run, to_numpy


@pytest.mark.parametrize("ffn_type", ["swiglu", "geglu"])
def test_the_gated_network_uses_its_activation(ffn_type):
    x = tokens()[:2, :6]
    layer = layers.SwiGLU(7, ffn_type, initializer_range=0.4)
    layer.build(x.shape)
    gate, up, down = (to_numpy(w.value).astype("float64") for w in layer.trainable_variables)
    gated = x @ gate
    if ffn_type == "swiglu":
        active = gated / (1 + np.exp(-gated))
    else:
        active = gated * 0.5 * (1 + np.vectorize(math.erf)(gated / 2**0.5))
    assert_close(run(layer, x), (active * (x @ up)) @ down, 1e-5)
