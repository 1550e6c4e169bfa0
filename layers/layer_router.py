"""The layer router of Dr.LLM: how often a layer runs for a row, decided from its prompt."""

from typing import Annotated, Any

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .initializers import Normal
from .ops.backend.autodiff import full_precision
from .ops.tensor_types import Tensor
from .projection import RowDense
from .shapes import Shape

ACTIONS = 3  # skip, execute, repeat: an action says how often the layer runs
EXECUTE = 1


@keras.saving.register_keras_serializable(package="qwen3_next")
class LayerRouter(CheckedLayer):
    """Gives the logits of skipping a layer, running it, and running it twice.

        w = 1 .. W windows of the prompt, u_w the mean of the layer's input in each
        logits = (mean_w W_2 gelu(W_1 u_w + b_1) + b_2 + execute_bias [0, 1, 0]) / temperature

    A window holds `window_size` tokens, or more where the prompt would need more than
    `num_windows` of them. W_2 is zero at first: a new router runs its layer for every prompt.

    Args:
        hidden_size: Width of the hidden layer.
        window_size: Tokens of a window.
        num_windows: The most windows.
        temperature: Divides the logits.
        execute_bias: Added to the logit of running the layer once.
        initializer_range: Standard deviation of the initial W_1.

    Call arguments:
        hidden: `(B, T, D)`, the input of the layer.
        prompt: `(B, T)` bool, true at the real tokens of the prompt, anywhere in the row. Without
            any, the logits are those of `execute_bias` alone.

    Returns:
        `(B, 3)` float32 under every dtype policy.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import LayerRouter

        router = LayerRouter(hidden_size=16)
        logits = router(np.ones((2, 20, 8), "float32"), prompt=np.ones((2, 20), bool))
        assert np.argmax(logits, axis=-1).tolist() == [1, 1]
        ```

    Reference: Dr.LLM, arXiv 2510.12773, section 3.
    """

    def __init__(
        self,
        hidden_size: int = 256,
        window_size: int = 8,
        num_windows: int = 8,
        temperature: float = 1.0,
        execute_bias: float = 3.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.hidden_size = hidden_size
        self.window_size = window_size
        self.num_windows = num_windows
        self.temperature = temperature
        self.execute_bias = execute_bias
        self.initializer_range = initializer_range

    def build(self, hidden_shape: Shape, prompt_shape: Shape | None = None) -> None:
        # Rounding its logits would change which layers run.
        options = {"kernel_initializer": Normal(self.initializer_range), "dtype": "float32"}
        self.features = RowDense(self.hidden_size, name="features", **options)
        options["kernel_initializer"] = "zeros"
        self.score = RowDense(ACTIONS, name="score", **options)
        self.features.build((None, None, hidden_shape[-1]))
        self.score.build((None, None, self.hidden_size))

    def call(
        self, hidden: Annotated[Tensor, "B T D"], prompt: Annotated[Tensor, "B T"]
    ) -> Annotated[Tensor, "B 3"]:
        with full_precision():
            windows, share = self._windows(ops.cast(hidden, "float32"), ops.cast(prompt, "bool"))
            logits = self.score(ops.gelu(self.features(windows)))  # (B, W, 3)
            logits = ops.sum(logits * share[..., None], axis=1)
        runs = ops.cast(ops.arange(ACTIONS) == EXECUTE, "float32")
        return (logits + self.execute_bias * runs) / self.temperature

    def _windows(self, hidden: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the windows, `(B, W, D)`, and the share of each in the logits, `(B, W)`."""
        rank = ops.cumsum(ops.cast(prompt, "int32"), axis=1) - 1
        length = rank[:, -1:] + 1
        size = ops.maximum(-(-length // self.num_windows), self.window_size)
        number = ops.where(prompt, rank // size, self.num_windows)  # one behind the last: none
        member = number[..., None] == ops.arange(self.num_windows, dtype="int32")  # (B, T, W)
        member = ops.cast(member, "float32")
        counts = ops.sum(member, axis=1)
        sums = ops.einsum("btw,btd->bwd", member, hidden)
        used = ops.cast(counts > 0, "float32")
        share = used / ops.maximum(ops.sum(used, axis=1, keepdims=True), 1.0)
        return sums / ops.maximum(counts, 1.0)[..., None], share

    def compute_output_shape(self, hidden_shape: Shape, prompt_shape: Shape | None = None) -> Shape:
        return (hidden_shape[0], ACTIONS)

    def compute_output_spec(self, hidden: Any, prompt: Any) -> keras.KerasTensor:
        return keras.KerasTensor((hidden.shape[0], ACTIONS), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden_size": self.hidden_size,
            "window_size": self.window_size,
            "num_windows": self.num_windows,
            "temperature": self.temperature,
            "execute_bias": self.execute_bias,
            "initializer_range": self.initializer_range,
        }
