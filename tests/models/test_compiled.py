"""Compiled functions of a model, outside of `fit`."""

import keras
import numpy as np
import pytest

from qwen3_next.layers.ops.backend.autodiff import custom_gradient
from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import BACKEND

OF_NEW_SHAPES = {
    "model": lambda: compile_with_weights(keras.Sequential(), lambda x: x + 1),
    "op": lambda: custom_gradient(lambda x: (x + 1, ()), lambda _, d_output: (d_output,)),
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow alone warns of new shapes")
@pytest.mark.parametrize("kind", OF_NEW_SHAPES)
def test_new_shapes_are_no_reason_for_a_warning(kind, caplog):
    import tensorflow as tf

    function = OF_NEW_SHAPES[kind]()
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for size in range(1, 12):
            function(np.zeros(size, "float32"))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
