"""Small models for tests, and compiled calls to them."""

import functools

import keras
import numpy as np

from qwen3_next import Qwen3Next, pad
from qwen3_next.models.compiled import compile_with_weights

# One layer of each kind of mixer and of feed-forward network, all sizes different.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_layers": 3,
    "layer_types": ("linear_attention", "full_attention", "linear_attention"),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 14,
    "mlp_only_layers": (1,),
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.01,
}
# One layer of each mixer, for tests that compile a training step.
TWO_LAYERS = {"num_layers": 2, "layer_types": ("linear_attention", "full_attention")}
# One MoE layer with linear attention, for tests of what does not depend on layers.
ONE_LAYER = {"num_layers": 1, "layer_types": None, "mlp_only_layers": ()}


def small(model=Qwen3Next, **changes):
    """A small model with the same weights every time."""
    keras.utils.set_random_seed(3)
    return model(**{**SMALL, **changes})


@functools.cache
def shared():
    """One small language model for all tests that do not change it."""
    return small()


@functools.cache
def _forward(model):
    return compile_with_weights(model, lambda inputs: model(inputs))


def logits(model, token_ids, padding_mask=None, segment_ids=None):
    """`model(inputs)` through a compiled call, as NumPy."""
    inputs = {"token_ids": np.asarray(token_ids, "int32")}
    if padding_mask is not None:
        inputs["padding_mask"] = np.asarray(padding_mask, bool)
    if segment_ids is not None:
        inputs["segment_ids"] = np.asarray(segment_ids, "int32")
    inputs = {key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()}
    return keras.ops.convert_to_numpy(_forward(model)(inputs))


def assert_greedy(model, prompts, tokens):
    """Whether new tokens are the likeliest ones in whole sequences, read without a cache."""
    whole = pad([np.concatenate(pair) for pair in zip(prompts, tokens, strict=True)])
    predicted = logits(model, **whole).argmax(-1)
    for row, prompt, new in zip(predicted, prompts, tokens):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][: len(new)], new)


def random_ids(*shape, seed=0, vocab_size=SMALL["vocab_size"]):
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype("int32")
