"""What the arguments of layers must be: a name means the same in every layer.

Rules are those of the configuration's fields of the same name; a test holds both together.
"""

from collections.abc import Mapping
from typing import Any

import keras

from qwen3_next.config.validation import (
    BOOLEAN,
    DROPOUT_RATE,
    NOT_NEGATIVE,
    OPTIONAL_NUMBER,
    POSITIVE,
    Rule,
    integer,
    is_list_of,
    number,
    one_of,
    optional_integer,
    require,
)

# Keras' own layers and the files that a layer goes into know no other.
PLAIN = Rule("a number of Python, not of NumPy", lambda value: not hasattr(value, "item"))
SIZE, COUNT = integer(1), integer(0)
LAYER = Rule("a layer", lambda value: isinstance(value, keras.layers.Layer))
RULES = {
    "alpha": POSITIVE,
    "attention_dropout": DROPOUT_RATE,
    "backprop_iterations": optional_integer(1),
    "bias_update_rate": NOT_NEGATIVE,
    "body": Rule("None or a layer", lambda value: value is None or LAYER.fits(value)),
    "confidence_threshold": number("in (0, 1]", lambda value: 0 < value <= 1),
    "dropout": DROPOUT_RATE,
    "epsilon": POSITIVE,
    "execute_bias": POSITIVE,
    "expert_warmup_steps": COUNT,
    "gate_bias": OPTIONAL_NUMBER,
    "gradient_checkpointing": BOOLEAN,
    "granularity": one_of(("token", "sequence")),
    "head_dim": SIZE,
    "hidden_size": SIZE,
    "inference_state": one_of(("mean", "final")),
    "initializer_range": POSITIVE,
    "input_injection": BOOLEAN,
    "intermediate_size": SIZE,
    "linear_conv_kernel_dim": SIZE,
    "linear_key_head_dim": SIZE,
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
    "linear_value_head_dim": SIZE,
    "max_think_iterations": SIZE,
    "mixer": LAYER,
    "mlp": LAYER,
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": BOOLEAN,
    "num_attention_heads": SIZE,
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "num_key_value_heads": SIZE,
    "num_windows": SIZE,
    "output_gate": BOOLEAN,
    "output_shape": Rule(
        "a list of integers of at least 1", lambda value: is_list_of(value, SIZE.fits)
    ),
    "partial_rotary_factor": number("in (0, 1]", lambda value: 0 < value <= 1),
    "rank": SIZE,
    "reselect": BOOLEAN,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "router_warmup_steps": COUNT,
    "sample_iterations": BOOLEAN,
    "shared_expert_intermediate_size": COUNT,
    "temperature": POSITIVE,
    "use_gumbel": BOOLEAN,
    "warmup_steps": COUNT,
    "window_size": SIZE,
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first argument that breaks its rule.

    Args:
        arguments: Arguments by name, `locals()` at the head of an `__init__`; those without a rule
            are left to the layer.
    """
    for name, value in arguments.items():
        if name in RULES:
            require(RULES[name], name, value)
            require(PLAIN, name, value)
