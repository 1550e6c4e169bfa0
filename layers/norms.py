"""The normalisation layers that `normalization_type` chooses from."""

import keras

from qwen3_next.config.validation import one_of, require

from .zero_centered_rms_norm import ZeroCenteredRMSNorm

NORMALIZATIONS = {
    "zero_centered_rms_norm": ZeroCenteredRMSNorm,
    "rms_norm": keras.layers.RMSNormalization,
}


def make_norm(
    normalization_type: str, epsilon: float, name: str, dtype: object
) -> keras.layers.Layer:
    """Creates the norm called `normalization_type` in a config."""
    require(one_of(sorted(NORMALIZATIONS)), "normalization_type", normalization_type)
    return NORMALIZATIONS[normalization_type](epsilon=epsilon, name=name, dtype=dtype)
