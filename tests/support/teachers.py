"""Small models like Qwen3, with attention in all layers, for conversions."""

import keras
import numpy as np

from qwen3_next import Qwen3Next

QWEN3 = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_layers": 4,
    "full_attention_interval": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "num_experts": 0,
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
    "initializer_range": 0.2,
}
QWEN3_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 0,
}


def qwen3(**changes):
    """A small Qwen3 with the same weights every time, none of its norms at 1."""
    keras.utils.set_random_seed(5)
    model = Qwen3Next(**{**QWEN3, **changes})
    rng = np.random.default_rng(5)
    for variable in model.weights:
        if "norm" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def weights_of(model):
    return {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.weights}
