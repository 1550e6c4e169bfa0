"""The embedding of token ids."""

from typing import Annotated

import keras
from keras import ops

from .checked_layer import CheckedLayer
from .ops.backend.autodiff import dense_gradient
from .ops.checks import to_int32
from .ops.tensor_types import Tensor


@keras.saving.register_keras_serializable(package="qwen3_next")
class TokenEmbedding(CheckedLayer, keras.layers.Embedding):
    """Rows of a table, `y_t = E[token_t]`, with one dense gradient on every backend.

    An id that has no row gives NaN on every backend: a compiled program cannot refuse a value, and
    the row of another token would hide it. A loss that it enters is NaN, and so are its gradients.

    Args:
        input_dim: Rows V of the table.
        output_dim: Width D.
        **kwargs: As for `keras.layers.Embedding`.

    Call arguments:
        inputs: `(B, T)` integers in `[0, V)`.

    Returns:
        `(B, T, D)` in the compute dtype.

    Example:

    ```python
    import numpy as np
    from qwen3_next.layers import TokenEmbedding

    y = TokenEmbedding(10, 4)(np.array([[1, 2, 1]]))
    assert y.shape == (1, 3, 4)
    ```
    """

    def call(self, inputs: Annotated[Tensor, "..."]) -> Annotated[Tensor, "... D"]:
        table = dense_gradient(ops.convert_to_tensor(self.embeddings))
        ids = to_int32(inputs)
        known = (ids >= 0) & (ids < self.input_dim)
        rows = ops.take(table, ops.where(known, ids, 0), axis=0)
        rows = ops.cast(rows, self.compute_dtype)
        return ops.where(known[..., None], rows, ops.cast(float("nan"), rows.dtype))
