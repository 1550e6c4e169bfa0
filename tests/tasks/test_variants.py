"""The named variants, with one layer of each kind, through everything a user does first."""

import zlib

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next
from tests.support.memory import free_programs
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import random_ids


def checksums(model):
    arrays = (keras.ops.convert_to_numpy(variable) for variable in model.weights)
    return [zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in arrays]


@pytest.mark.parametrize(("variant", "options"), [("tiny", {}), ("small", CHEAPEST_STEPS)])
def test_a_variant_builds_fits_saves_loads_and_generates(variant, options, tmp_path):
    keras.utils.set_random_seed(0)
    model = Qwen3Next.from_variant(variant, vocab_size=512, num_layers=2, full_attention_interval=2)
    assert len(set(model.config.layer_types)) == 2
    model.compile(keras.optimizers.SGD(0.01), **options)
    before = keras.ops.convert_to_numpy(model.head_kernel())
    history = model.fit(random_ids(2, 16, vocab_size=512), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.abs(keras.ops.convert_to_numpy(model.head_kernel()) - before).max() > 0
    model.save(tmp_path / "model.keras")
    saved = checksums(model)
    del model, before  # one of them at a time is enough for a small machine
    free_programs()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert checksums(loaded) == saved
    tokens, _ = loaded.generate([[1, 2, 3], [4]], max_new_tokens=4)
    assert [len(row) for row in tokens] == [4, 4]
