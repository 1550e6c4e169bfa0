"""Gated RMSNorm, the output norm of a Gated DeltaNet head."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="qwen3_next")
class GatedRMSNorm(keras.layers.Layer):
    """RMSNorm, then a SiLU gate.

        y = w * x / sqrt(mean(x^2) + epsilon) * silu(gate)

    The weight is plain (it starts at 1) and shared by all heads. Computed in float32, returned in
    the dtype of x.

    Args:
        epsilon: Added to the mean square. Defaults to `1e-6`.

    Call arguments:
        x: `(..., V)`.
        gate: `(..., V)`, before the SiLU.

    Reference: Gated Delta Networks, arXiv 2412.06464, section 3.4.
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape, gate_shape=None):
        self.weight = self.add_weight(
            name="weight", shape=(input_shape[-1],), initializer="ones", autocast=False
        )

    def call(self, x, gate):
        normed = ops.rms_normalization(
            ops.cast(x, "float32"), ops.cast(self.weight, "float32"), epsilon=self.epsilon
        )
        return ops.cast(normed * ops.silu(ops.cast(gate, "float32")), self.compute_dtype)

    def compute_output_shape(self, input_shape, gate_shape=None):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
