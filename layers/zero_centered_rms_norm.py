"""Zero-centred RMSNorm."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="qwen3_next")
class ZeroCenteredRMSNorm(keras.layers.Layer):
    """RMSNorm whose weight is stored around zero.

        y = x / sqrt(mean(x^2) + epsilon) * (1 + w)

    "Zero-centred" is the weight, which starts at 0 and decays towards a scale of 1; the mean of x
    is not subtracted. Computed in float32, returned in the dtype of x.

    Args:
        epsilon: Added to the mean square. Defaults to `1e-6`.

    Reference: Qwen3-Next (2025), "zero-centered and weight-decayed layernorm".
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        self.weight = self.add_weight(
            name="weight", shape=(input_shape[-1],), initializer="zeros", autocast=False
        )

    def call(self, x):
        scale = 1.0 + ops.cast(self.weight, "float32")
        return ops.rms_normalization(x, scale, axis=-1, epsilon=self.epsilon)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
