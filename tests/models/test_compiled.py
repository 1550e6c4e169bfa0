"""Compiled functions of a model, outside of `fit`."""

import keras
import numpy as np
import pytest

from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import BACKEND


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow alone warns of new shapes")
def test_new_shapes_are_no_reason_for_a_warning(caplog):
    import tensorflow as tf

    function = compile_with_weights(keras.Sequential(), lambda x: x + 1)
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for size in range(1, 12):
            function(np.zeros(size, "float32"))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
