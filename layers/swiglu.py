"""Gated feed-forward network."""

from typing import Annotated, Any

import keras

from qwen3_next.config.validation import one_of, require

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .ops.activations import ACTIVATIONS
from .ops.tensor_types import Tensor
from .projection import dense
from .shapes import Shape

GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


def gate_activation(ffn_type: str) -> str:
    """The name in `ACTIVATIONS` of the gate's activation; `ValueError` for an unknown type."""
    require(one_of(sorted(GATED_ACTIVATIONS)), "ffn_type", ffn_type)
    return GATED_ACTIVATIONS[ffn_type]


@keras.saving.register_keras_serializable(package="qwen3_next")
class SwiGLU(CheckedLayer):
    """Feed-forward network with a gate: `down(act(gate(x)) * up(x))`, no biases.

    Args:
        intermediate_size: Width of the hidden layer.
        ffn_type: `"swiglu"` (act is SiLU) or `"geglu"` (exact GELU).
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        x: `(..., D)`.

    Returns:
        `(..., D)`.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import SwiGLU

        y = SwiGLU(intermediate_size=16)(np.ones((1, 3, 8), "float32"))
        assert y.shape == (1, 3, 8)
        ```

    Reference: GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(
        self,
        intermediate_size: int,
        ffn_type: str = "swiglu",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(**kwargs)
        self.intermediate_size = intermediate_size
        self.ffn_type = ffn_type
        self.initializer_range = initializer_range
        self.activation = gate_activation(ffn_type)

    def build(self, input_shape: Shape) -> None:
        width, inner = input_shape[-1], self.intermediate_size
        std, policy = self.initializer_range, self.dtype_policy
        self.gate_proj = dense(inner, std, "gate_proj", policy)
        self.up_proj = dense(inner, std, "up_proj", policy)
        self.down_proj = dense(width, std, "down_proj", policy)
        self.gate_proj.build((None, width))
        self.up_proj.build((None, width))
        self.down_proj.build((None, inner))

    def call(self, x: Annotated[Tensor, "... D"]) -> Annotated[Tensor, "... D"]:
        gate = ACTIVATIONS[self.activation].function(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "intermediate_size": self.intermediate_size,
            "ffn_type": self.ffn_type,
            "initializer_range": self.initializer_range,
        }
