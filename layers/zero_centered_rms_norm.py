"""Zero-centred RMSNorm."""

from typing import Annotated, Any

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .ops.sums import scaled
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class ZeroCenteredRMSNorm(CheckedLayer):
    """RMSNorm whose weight is stored around zero.

        y = x / sqrt(mean(x^2) + epsilon) * (1 + w)

    "Zero-centred" is the weight, which starts at 0 and decays towards a scale of 1; the mean of x
    is not subtracted. Computed in float32, returned in the dtype of x.

    Args:
        epsilon: Added to the mean square. Defaults to `1e-6`.

    Call arguments:
        x: `(..., D)`.

    Returns:
        `(..., D)` in the dtype of x.

    Example:
        ```python
        import numpy as np
        from keras import ops
        from qwen3_next.layers import ZeroCenteredRMSNorm

        y = ZeroCenteredRMSNorm()(np.full((1, 3, 8), 5.0, "float32"))
        assert ops.max(ops.abs(y - 1.0)) < 1e-5
        ```

    Reference: Qwen3-Next (2025), "zero-centered and weight-decayed layernorm".
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        check_arguments(locals())
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Shape) -> None:
        self.weight = self.add_weight(
            name="weight", shape=(input_shape[-1],), initializer="zeros", autocast=False
        )

    def call(self, x: Annotated[Tensor, "... D"]) -> Annotated[Tensor, "... D"]:
        normed = ops.rms_normalization(ops.cast(x, "float32"), axis=-1, epsilon=self.epsilon)
        return ops.cast(scaled(normed, 1.0 + ops.cast(self.weight, "float32")), x.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
