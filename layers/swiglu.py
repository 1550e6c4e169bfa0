"""Gated feed-forward network."""

import keras

from .initializers import Normal

GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


def gated_activation(ffn_type):
    """The Keras activation on the gate branch of the feed-forward network called `ffn_type`."""
    if ffn_type not in GATED_ACTIVATIONS:
        raise ValueError(
            f"`ffn_type` must be one of {sorted(GATED_ACTIVATIONS)}. Received: {ffn_type=}"
        )
    if ffn_type == "geglu":
        return exact_gelu
    return keras.activations.get(GATED_ACTIVATIONS[ffn_type])


def exact_gelu(x):
    """GELU by the error function, as the published `hidden_act: "gelu"` means it."""
    return keras.ops.gelu(x, approximate=False)


@keras.saving.register_keras_serializable(package="qwen3_next")
class SwiGLU(keras.layers.Layer):
    """Feed-forward network with a gate: `down(act(gate(x)) * up(x))`, no biases.

    Args:
        intermediate_size: Width of the hidden layer.
        ffn_type: `"swiglu"` (act is SiLU) or `"geglu"` (exact GELU).
        initializer_range: Standard deviation of the normal initial weights.

    Reference: GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, intermediate_size, ffn_type="swiglu", initializer_range=0.02, **kwargs):
        super().__init__(**kwargs)
        self.intermediate_size = intermediate_size
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range
        self.activation = gated_activation(ffn_type)

    def build(self, input_shape):
        width, inner = input_shape[-1], self.intermediate_size
        self.gate_proj = self._dense(inner, "gate_proj")
        self.up_proj = self._dense(inner, "up_proj")
        self.down_proj = self._dense(width, "down_proj")
        self.gate_proj.build((None, width))
        self.up_proj.build((None, width))
        self.down_proj.build((None, inner))

    def call(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))

    def compute_output_shape(self, input_shape):
        return input_shape

    def _dense(self, units, name):
        return keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=Normal(self.initializer_range),
            name=name,
            dtype=self.dtype_policy,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_size": self.intermediate_size,
            "ffn_type": self.ffn_type,
            "initializer_range": self.initializer_range,
        }
