"""What a user froze stays frozen in a `.keras` file, beside the optimizer's state of the rest."""

import keras
import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3Next
from qwen3_next.models.trainable_layers import FIELD
from tests.support.mtp_models import LIGHT
from tests.support.small_models import ONE_LAYER, random_ids, small

IDS = random_ids(2, 12)
TWO = {**LIGHT, "num_layers": 2, "layer_types": ("full_attention",) * 2}


def paths(variables):
    return [variable.path for variable in variables]


def test_frozen_layers_survive_a_file(tmp_path):
    model = small(**TWO)
    model.backbone.trainable = False
    model.backbone.decoder_layers[1].trainable = True
    model.backbone.decoder_layers[1].mlp.trainable = False
    model.compile("adamw")
    model.fit(IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert paths(loaded.trainable_variables) == paths(model.trainable_variables)
    assert not loaded.backbone.decoder_layers[0].trainable
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        a, b = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
        np.testing.assert_array_equal(a, b)


def test_what_was_unfrozen_stays_so():
    model = small(**LIGHT, mtp=MTPConfig(), freeze_backbone=True)
    model.backbone.trainable = True
    again = Qwen3Next.from_config(model.get_config())
    assert paths(again.trainable_variables) == paths(model.trainable_variables)
    assert again.backbone.trainable and not again.lm_head.trainable


def test_the_model_itself_may_be_frozen():
    model = small(**ONE_LAYER)
    assert model.get_config()[FIELD] == {}
    model.trainable = False
    assert model.get_config()[FIELD] == {"": False}
    assert Qwen3Next.from_config(model.get_config()).trainable_variables == []


@pytest.mark.parametrize("saved", [["/model"], {"/modle": False}, {"/model": 0}, "all", 1])
def test_a_damaged_entry_is_refused(saved):
    config = {**small(**ONE_LAYER).get_config(), FIELD: saved}
    with pytest.raises(ValueError, match=f"{FIELD}.*Received"):
        Qwen3Next.from_config(config)
