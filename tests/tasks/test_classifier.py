"""The classifier: pooling, and learning labels and numbers."""

import keras
import numpy as np

from qwen3_next import Qwen3NextClassifier, pad
from tests.support.mtp_models import DENSE, LIGHT
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import TWO_LAYERS, logits_once, random_ids, small

IDS = random_ids(4, 20)


def test_a_classifier_pools_the_last_real_token():
    model = small(Qwen3NextClassifier, num_labels=3, **{**DENSE, **TWO_LAYERS})
    rows = [IDS[0, :7], IDS[1, :12]]
    alone = [logits_once(model, row[None])[0] for row in rows]
    for side in ("left", "right"):
        padded = logits_once(model, **pad(rows, length=20, side=side))
        np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_a_classifier_learns_and_a_regressor_too():
    labels = np.array([0, 1, 2, 1])
    model = small(Qwen3NextClassifier, num_labels=3, **LIGHT)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    history = model.fit(IDS, labels, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    model = small(Qwen3NextClassifier, num_labels=1, **LIGHT)
    model.compile(keras.optimizers.Adam(0.01), loss="mse", **CHEAPEST_STEPS)
    history = model.fit(IDS, labels[:, None].astype("float32"), epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
