"""The named variants, layer for layer, through everything a user does first."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next
from tests.support.small_models import random_ids


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_a_variant_builds_fits_saves_loads_and_generates(variant, tmp_path):
    keras.utils.set_random_seed(0)
    model = Qwen3Next.from_variant(variant, vocab_size=512)
    model.compile(keras.optimizers.SGD(0.01))
    before = keras.ops.convert_to_numpy(model.head_kernel())
    history = model.fit(random_ids(2, 16, vocab_size=512), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.abs(keras.ops.convert_to_numpy(model.head_kernel()) - before).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights):
        a, b = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
        np.testing.assert_array_equal(a, b)
    tokens, _ = loaded.generate([[1, 2, 3], [4]], max_new_tokens=4)
    assert [len(row) for row in tokens] == [4, 4]
