"""The module of multi-token prediction against its oracle, and wrapping models with modules."""

import numpy as np
import pytest
from keras import ops

from qwen3_next import (
    MTPConfig,
    Qwen3NextBackbone,
    Qwen3NextClassifier,
    Qwen3NextConfig,
    wrap_model_with_mtp,
)
from tests.support import oracles
from tests.support.mtp_models import DENSE
from tests.support.running import assert_close, run, weight_arrays, with_weights
from tests.support.small_models import SMALL, small


def test_the_module_matches_the_oracle():
    model = small(**DENSE, mtp=MTPConfig())
    module = model.mtp_modules[0]
    named = {
        v.path.removeprefix("mtp/").rsplit("/", 1)[0]: ops.convert_to_numpy(v.value)
        for v in module.trainable_variables
    }
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 2, 11, SMALL["hidden_size"])).astype("float32")
    found = run(with_weights(module), *weight_arrays(module), *x)
    heads = SMALL["num_attention_heads"], SMALL["num_key_value_heads"]
    rotary = SMALL["rope_theta"], SMALL["partial_rotary_factor"]
    expected = oracles.multi_token_prediction(*x, named, *heads, *rotary, 1e-6)
    assert_close(found, expected, 1e-5)
    named["fc"] = named["fc"] * 1.01
    wrong = oracles.multi_token_prediction(*x, named, *heads, *rotary, 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(found, wrong, 1e-5)


def test_wrapping_shares_the_backbone():
    base = small()
    model = wrap_model_with_mtp(base)
    assert model.backbone is base.backbone and model.lm_head is base.lm_head
    with pytest.raises(ValueError, match="already"):
        wrap_model_with_mtp(model)


@pytest.mark.parametrize("kind", [Qwen3NextBackbone, Qwen3NextClassifier])
def test_only_language_models_have_modules(kind):
    labels = {"num_labels": 2} if kind is Qwen3NextClassifier else {}
    with pytest.raises(ValueError, match="multi-token prediction"):
        kind(Qwen3NextConfig(**SMALL, mtp=MTPConfig()), **labels)
    with pytest.raises(ValueError, match="language model"):
        wrap_model_with_mtp(kind(Qwen3NextConfig(**SMALL), **labels))
