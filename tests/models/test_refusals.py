"""What a model cannot do is refused by name, before anything is computed."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextBackbone
from tests.support.small_models import ONE_LAYER, SMALL, random_ids, shared, small

IDS = random_ids(2, 8)


def test_quantization_is_refused():
    with pytest.raises(ValueError, match=r"quantized.*mode='int8'"):
        shared().quantize("int8")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int8_from_float32"])
def test_weights_are_floating_point_numbers(dtype):
    with pytest.raises(ValueError, match="dtype"):
        small(**ONE_LAYER, dtype=dtype)


def test_a_cache_takes_no_segments():
    cache = shared().init_cache(2, 16)
    with pytest.raises(ValueError, match=r"segment_ids.*Received"):
        shared().extend({"token_ids": IDS, "segment_ids": IDS}, cache)


def test_a_replayable_pass_needs_a_cache():
    with pytest.raises(ValueError, match=r"cache.*Received"):
        shared().backbone(IDS, replayable=True)


def test_a_backbone_of_other_sizes_is_refused():
    backbone = small(Qwen3NextBackbone, **ONE_LAYER)
    with pytest.raises(ValueError, match=r"backbone.*Received"):
        Qwen3Next(backbone.config.replace(hidden_size=32), backbone=backbone)
    head = keras.layers.Dense(7, use_bias=False)
    head.build((None, SMALL["hidden_size"]))
    with pytest.raises(ValueError, match=r"lm_head.*Received"):
        Qwen3Next(backbone.config, backbone=backbone, lm_head=head)


@pytest.mark.parametrize("field", ["hidden_size", "rope_theta", "num_experts", "norm_topk_prob"])
def test_a_saved_configuration_without_a_field_is_damaged(field):
    saved = small(**ONE_LAYER).get_config()
    del saved[field]
    with pytest.raises(ValueError, match=f"Received: one without.*{field}"):
        Qwen3Next.from_config(saved)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "freeze_backbone"])
@pytest.mark.parametrize("value", [1, "no", None])
def test_switches_are_bools(option, value):
    with pytest.raises(ValueError, match=f"{option}=.*"):
        small(**ONE_LAYER, **{option: value})


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", [np.inf, np.nan, "1", True])
def test_numbers_are_finite(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*"):
        small(**{field: value})
