"""The classifier: pooling, and learning labels and numbers."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3NextClassifier, pad
from qwen3_next.models.compiled import compile_with_weights
from tests.support.small_models import TWO_LAYERS, random_ids, small

IDS = random_ids(4, 20)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_pools_the_last_real_token(side):
    model = small(Qwen3NextClassifier, num_labels=3, **TWO_LAYERS)
    rows = [IDS[0, :7], IDS[1, :12]]
    call = compile_with_weights(model, lambda x: model(x))
    padded = keras.ops.convert_to_numpy(call(pad(rows, length=20, side=side)))
    for row, got in zip(rows, padded):
        alone = keras.ops.convert_to_numpy(call(pad([row], length=len(row))))
        np.testing.assert_allclose(got, alone[0], atol=1e-5)


def test_a_classifier_learns_and_a_regressor_too():
    labels = np.array([0, 1, 2, 1])
    model = small(Qwen3NextClassifier, num_labels=3, **TWO_LAYERS)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    history = model.fit(IDS, labels, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    model = small(Qwen3NextClassifier, num_labels=1, **TWO_LAYERS)
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    history = model.fit(IDS, labels[:, None].astype("float32"), epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
