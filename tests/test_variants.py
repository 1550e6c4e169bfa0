"""The named variants, layer for layer, through everything a user does first."""

import keras
import numpy as np
import pytest
from models import random_ids

from qwen3_next import Qwen3Next


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
    prompts = [[1, 2, 3], [4]]
    tokens, _ = model.generate(prompts, max_new_tokens=4)
    again, _ = loaded.generate(prompts, max_new_tokens=4)
    np.testing.assert_array_equal(tokens, again)
