"""Rotary position embedding of the first part of every head."""

from typing import Annotated, Any

import keras
import numpy as np
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class PartialRotaryEmbedding(CheckedLayer):
    """Rotates the first `partial_rotary_factor` of the head dims, the rest passes through.

    With r rotated dims, dim i < r/2 is paired with dim i + r/2 (the halves, not neighbours):

        angle = position * rope_theta^(-2i / r)
        (x_i, x_{i+r/2}) -> (x_i cos - x_{i+r/2} sin,  x_{i+r/2} cos + x_i sin)

    Angles and rotation are computed in float32, the result has the compute dtype.

    Args:
        rope_theta: Base of the wavelengths. Defaults to `10000.0`.
        partial_rotary_factor: Fraction of the head dims that are rotated. Defaults to `1.0`.

    Call arguments:
        x: `(B, T, H, D)`.
        positions: `(B, T)` or `(1, T)` integers.

    Returns:
        `(B, T, H, D)` in the compute dtype.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import PartialRotaryEmbedding

        x = np.ones((1, 3, 2, 8), "float32")
        y = np.array(PartialRotaryEmbedding(partial_rotary_factor=0.5)(x, np.arange(3)[None]))
        assert y.shape == x.shape
        assert (y[..., 4:] == x[..., 4:]).all()
        ```

    Reference: RoFormer, arXiv 2104.09864.
    """

    def __init__(
        self, rope_theta: float = 10000.0, partial_rotary_factor: float = 1.0, **kwargs: Any
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor

    def build(self, x_shape: Shape, positions_shape: Shape | None = None) -> None:
        """There are no weights; Keras asks for one argument per argument of `call`."""

    def call(
        self, x: Annotated[Tensor, "B T H D"], positions: Annotated[Tensor, "B|1 T"]
    ) -> Annotated[Tensor, "B T H D"]:
        x = ops.cast(x, self.compute_dtype)
        rotated = rotary_dim(x.shape[-1], self.partial_rotary_factor)
        half = rotated // 2
        # Made and rounded on the host: the powers of backends differ by a rounding, and far
        # positions by that many times as much.
        frequencies = np.float32(float(self.rope_theta) ** (-np.arange(0, rotated, 2) / rotated))
        angles = ops.cast(positions, "float32")[..., None, None] * frequencies  # (B, T, 1, r/2)
        cos, sin = ops.cos(angles), ops.sin(angles)
        first = ops.cast(x[..., :half], "float32")
        second = ops.cast(x[..., half:rotated], "float32")
        turned = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return ops.concatenate([ops.cast(turned, x.dtype), x[..., rotated:]], axis=-1)

    def compute_output_shape(self, x_shape: Shape, positions_shape: Shape | None = None) -> Shape:
        return x_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }


def rotary_dim(head_dim: int, partial_rotary_factor: float) -> int:
    """Number of rotated dims of a head, which must be even."""
    rotated = int(head_dim * partial_rotary_factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise ValueError(
            "`head_dim * partial_rotary_factor` must be even and between 2 and `head_dim`. "
            f"Received: {head_dim=}, {partial_rotary_factor=}"
        )
    return rotated
