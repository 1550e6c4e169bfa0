"""Small models for tests, and compiled calls to them."""

import functools

import keras
import numpy as np

from qwen3_next import Qwen3Next, pad
from qwen3_next.layers.ops import row_product
from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import CHEAPEST, run_to_tensors

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
    return _logits(_forward(model), token_ids, padding_mask, segment_ids)


def logits_once(model, token_ids, padding_mask=None, segment_ids=None):
    """The same of a model that is not called often enough to be worth a program of its own."""
    return _logits(called_once(_call, model), token_ids, padding_mask, segment_ids)


def called_once(function, model):
    """`function(model, inputs)` of the inputs, in the way with the fewest programs.

    Models of one configuration share one, which takes the variables.
    """
    if CHEAPEST == "eager":
        return functools.partial(function, model)
    names = tuple(variable.path for variable in model.variables)
    key = function, type(model), model.config, model.dtype_policy.name, names
    if key not in _programs():
        _programs()[key] = _with_variables(function, model)
    values = [variable.value for variable in model.variables]
    return lambda inputs: run_to_tensors(_programs()[key], values, inputs, mode=CHEAPEST)


@functools.cache
def _programs():
    return {}


def _with_variables(function, model):
    variables = model.variables

    def call(values, inputs):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(model, inputs)

    return call


def _call(model, inputs):
    return model(inputs)


def _logits(forward, token_ids, padding_mask, segment_ids):
    inputs = {"token_ids": np.asarray(token_ids, "int32")}
    if padding_mask is not None:
        inputs["padding_mask"] = np.asarray(padding_mask, bool)
    if segment_ids is not None:
        inputs["segment_ids"] = np.asarray(segment_ids, "int32")
    inputs = {key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()}
    return keras.ops.convert_to_numpy(forward(inputs))


def with_turned_heads(monkeypatch):
    """Turns every head round, which pays for large ones alone; a list with an item per product."""
    monkeypatch.setattr(row_product, "SMALLEST_TURNED", 1)
    monkeypatch.setattr(row_product, "PRODUCTS", 1)
    used, product = [], row_product.multiply_turned
    monkeypatch.setattr(row_product, "multiply_turned", lambda *xs: used.append(1) or product(*xs))
    return used


def assert_greedy(model, prompts, tokens):
    """Whether new tokens are the likeliest ones in whole sequences, read without a cache."""
    whole = pad([np.concatenate(pair) for pair in zip(prompts, tokens, strict=True)])
    predicted = logits(model, **whole).argmax(-1)
    for row, prompt, new in zip(predicted, prompts, tokens):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][: len(new)], new)


def random_ids(*shape, seed=0, vocab_size=SMALL["vocab_size"]):
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype("int32")
