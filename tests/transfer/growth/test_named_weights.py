"""What is read of a model that becomes another one."""

import pytest

from qwen3_next import (
    HybridAttentionConfig,
    create_hybrid_from_qwen3,
    depth_upscale,
    grow_model_depth,
    grow_model_width,
    slice_model,
    upcycle_dense_to_moe,
)
from tests.support.teachers import qwen3

HYBRID = HybridAttentionConfig(deltanet_layer_pattern=[0], pattern_period=2)


@pytest.mark.parametrize(
    "become_another",
    [
        lambda model: grow_model_depth(model, num_new_layers=1),
        lambda model: grow_model_width(model, hidden_size=2 * model.config.hidden_size),
        lambda model: slice_model(model, intermediate_size=4, importance="weight_norm"),
        depth_upscale,
        upcycle_dense_to_moe,
        lambda model: create_hybrid_from_qwen3(model, HYBRID),
    ],
)
def test_what_was_learned_beside_the_weights_is_not_dropped_in_silence(become_another):
    model = qwen3(num_layers=2)
    model.backbone.decoder_layers[0].mixer.q_proj.enable_lora(2)
    with pytest.raises(ValueError, match=r"no others.*enable_lora.*Received: .*lora_kernel_a"):
        become_another(model)
