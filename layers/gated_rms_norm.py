"""Gated RMSNorm, the output norm of a Gated DeltaNet head."""

from typing import Annotated, Any

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .ops.activations import silu
from .ops.sums import scaled
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class GatedRMSNorm(CheckedLayer):
    """RMSNorm, then a SiLU gate.

        y = w * x / sqrt(mean(x^2) + epsilon) * silu(gate)

    The weight is plain (it starts at 1) and shared by all heads. Computed in float32, returned in
    the dtype of x.

    Args:
        epsilon: Added to the mean square. Defaults to `1e-6`.

    Call arguments:
        x: `(..., V)`.
        gate: `(..., V)`, before the SiLU.

    Returns:
        `(..., V)` in the dtype of x.

    Example:
        ```python
        import numpy as np
        from keras import ops
        from qwen3_next.layers import GatedRMSNorm

        x = np.ones((1, 3, 2, 8), "float32")
        assert GatedRMSNorm()(x, gate=x).shape == x.shape
        assert not ops.any(GatedRMSNorm()(x, gate=0.0 * x))
        ```

    Reference: Gated Delta Networks, arXiv 2412.06464, section 3.4.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        check_arguments(locals())
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, x_shape: Shape, gate_shape: Shape | None = None) -> None:
        self.weight = self.add_weight(
            name="weight", shape=(x_shape[-1],), initializer="ones", autocast=False
        )

    def call(
        self, x: Annotated[Tensor, "... V"], gate: Annotated[Tensor, "... V"]
    ) -> Annotated[Tensor, "... V"]:
        normed = ops.rms_normalization(ops.cast(x, "float32"), epsilon=self.epsilon)
        normed = scaled(normed, ops.cast(self.weight, "float32"))
        return ops.cast(normed * silu(ops.cast(gate, "float32")), self.compute_dtype)

    def compute_output_shape(self, x_shape: Shape, gate_shape: Shape | None = None) -> Shape:
        return x_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
