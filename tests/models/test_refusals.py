"""What a model cannot do is refused by name, before anything is computed."""

import keras
import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3Next, Qwen3NextBackbone, Qwen3NextClassifier
from qwen3_next.layers import SwiGLU
from qwen3_next.transfer.named_weights import NamedWeights
from tests.support.small_models import ONE_LAYER, SMALL, random_ids, shared, small

IDS = random_ids(2, 8)


def test_quantization_is_refused():
    with pytest.raises(ValueError, match=r"quantized.*mode='int8'"):
        shared().quantize("int8")


def test_the_kernel_of_a_quantized_head_is_not_read():
    model = small(**ONE_LAYER)
    model.lm_head.quantize("int8")
    refused = {"match": r"`lm_head` must not be quantized.*Received.*'int8'"}
    model.compile("adamw", run_eagerly=True)
    for read in (model.fit, model.evaluate, lambda ids: model.generate([[1, 2]], 2)):
        with pytest.raises(ValueError, **refused):
            read(IDS)
    with pytest.raises(ValueError, match=r"`model` must not be quantized.*Received"):
        NamedWeights(model)
    with pytest.raises(ValueError, **refused):
        Qwen3Next(model.config, lm_head=model.lm_head)


def test_a_dtype_policy_is_given_at_construction():
    for model in (shared(), shared().backbone):
        with pytest.raises(ValueError, match=r"`dtype=`.*Received: dtype_policy='mixed_bfloat16'"):
            model.dtype_policy = "mixed_bfloat16"
    assert shared().dtype_policy.name == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_default_dtype_of_keras_is_refused_in_favour_of_a_policy(dtype):
    model, layer, message = small(**ONE_LAYER), SwiGLU(8), "`keras.config.floatx.*policies"
    keras.config.set_floatx(dtype)
    try:
        for use in (
            lambda: small(**ONE_LAYER),
            lambda: SwiGLU(8),
            lambda: model(IDS),
            lambda: model.generate(IDS, 1),
            lambda: layer(np.ones((1, 2, 4), "float32")),
        ):
            with pytest.raises(ValueError, match=message):
                use()
    finally:
        keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert small(**ONE_LAYER).dtype_policy.name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("key", ["a", None])
def test_no_policy_of_a_map_is_quantized(key):
    policies = keras.dtype_policies.DTypePolicyMap(None if key else "int8_from_float32")
    if key:
        policies[key] = keras.dtype_policies.get("int8_from_float32")
    with pytest.raises(ValueError, match=r"`dtype` must be a policy of floating.*Received"):
        small(**ONE_LAYER, dtype=policies)


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
    vocab = SMALL["vocab_size"]
    for units, options in ((7, {}), (vocab, {"use_bias": True}), (vocab, {"activation": "relu"})):
        head = keras.layers.Dense(units, **{"use_bias": False, **options})
        head.build((None, SMALL["hidden_size"]))
        with pytest.raises(ValueError, match=r"`lm_head` must be.*without bias.*Received"):
            Qwen3Next(backbone.config, backbone=backbone, lm_head=head)


def test_parts_to_share_are_those_of_the_configuration():
    config = small(Qwen3NextBackbone, **ONE_LAYER).config
    mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=1, mtp_head_type="shared_lm_head")
    wide = config.replace(hidden_size=16, mtp=mtp)
    with pytest.raises(ValueError, match=r"`base` must be.*Received"):
        Qwen3NextBackbone(config, base="a")
    with pytest.raises(ValueError, match=r"`lm_head` must be.*Received"):
        Qwen3Next(config, lm_head="a")
    for score in ("a", keras.layers.Dense(2), Qwen3NextClassifier(config, num_labels=3).score):
        with pytest.raises(ValueError, match=r"`score` must be.*Received"):
            Qwen3NextClassifier(config, num_labels=2, score=score)
    for modules in (["a"], [], Qwen3Next(wide).mtp_modules):
        with pytest.raises(ValueError, match=r"`mtp_modules` must be.*Received"):
            Qwen3Next(config.replace(mtp=mtp), mtp_modules=modules)
    with pytest.raises(ValueError, match=r"`mtp_modules` must be.*Received"):
        Qwen3Next(config, mtp_modules=["a"])
    shared_modules = Qwen3Next(wide).mtp_modules
    assert Qwen3Next(wide, mtp_modules=shared_modules).mtp_modules[0] is shared_modules[0]


@pytest.mark.parametrize("iterations", [0, False, 2])
def test_iterations_need_a_think_loop(iterations):
    with pytest.raises(ValueError, match=f"think_iterations={iterations}"):
        shared()(IDS, think_iterations=iterations)


@pytest.mark.parametrize("counts", [[1], [-1, 1], [[1, 1]]])
def test_a_commit_takes_a_number_of_tokens_for_every_row(counts):
    backbone = shared().backbone
    cache = backbone.init_cache(2, 16)
    with pytest.raises(ValueError, match=r"`counts` must be.*Received"):
        backbone.commit(cache, None, counts)


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
