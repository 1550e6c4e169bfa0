"""The halting unit of a think loop: Adaptive Computation Time (ACT) for every token."""

from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .initializers import Normal
from .ops.backend.autodiff import full_precision
from .ops.tensor_types import Tensor
from .projection import RowDense
from .shapes import Shape


class Halting(NamedTuple):
    """How far every token is.

    Attributes:
        live: `(B, T)` bool, tokens that go on.
        total: `(B, T)` float32, sum of the halting probabilities so far.
        iterations: `(B, T)` int32, iterations so far.
        remainder: `(B, T)` float32, the weight that was left for the last iteration.
        mean: `(B, T, D)` float32, the weighted sum of states so far; `()` where nobody asks for it.
    """

    live: Annotated[Tensor, "B T"]
    total: Annotated[Tensor, "B T"]
    iterations: Annotated[Tensor, "B T"]
    remainder: Annotated[Tensor, "B T"]
    mean: Any


@keras.saving.register_keras_serializable(package="qwen3_next")
class HaltingUnit(CheckedLayer):
    """Gives the probability that a token needs no further iteration.

        p_j = sigmoid(w h_j + b)                          after iteration j

    A token halts after the first iteration N in which `p_1 + ... + p_N` reaches the threshold, at
    the latest after the last one. Its states weigh `p_1, ..., p_(N-1)` and the remainder
    `R = 1 - (p_1 + ... + p_(N-1))`; `N + R` is what its thinking costs.

    Args:
        confidence_threshold: Sum in (0, 1] that halts a token.
        initializer_range: Standard deviation of the initial weights.

    Call arguments:
        hidden: `(B, T, D)`.

    Returns:
        `(B, T)` float32 under every dtype policy.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import HaltingUnit

        unit = HaltingUnit()
        assert unit(np.ones((1, 3, 8), "float32")).shape == (1, 3)
        ```

    Reference: Adaptive Computation Time, arXiv 1603.08983, section 2.
    """

    def __init__(
        self, confidence_threshold: float = 0.9, initializer_range: float = 0.02, **kwargs: Any
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.confidence_threshold = confidence_threshold
        self.initializer_range = initializer_range

    def build(self, input_shape: Shape) -> None:
        # Rounding its output would change how often a token thinks.
        self.score = RowDense(
            1,
            kernel_initializer=Normal(self.initializer_range),
            name="score",
            dtype="float32",
        )
        self.score.build(input_shape)

    def call(self, hidden: Annotated[Tensor, "B T D"]) -> Annotated[Tensor, "B T"]:
        with full_precision():
            return ops.sigmoid(self.score(ops.cast(hidden, "float32"))[..., 0])

    def start(
        self, live: Annotated[Tensor, "B T"], hidden: Annotated[Tensor, "B T D"] | None
    ) -> Halting:
        """Before the first iteration; with `hidden` the weighted mean of states is kept."""
        zeros = ops.zeros_like(live, "float32")
        mean = () if hidden is None else ops.zeros_like(hidden, "float32")
        return Halting(live, zeros, ops.zeros_like(live, "int32"), zeros, mean)

    def advance(
        self,
        halting: Halting,
        probability: Annotated[Tensor, "B T"],
        hidden: Annotated[Tensor, "B T D"],
        is_last: bool | Tensor,
    ) -> Halting:
        """After an iteration that gave `hidden`.

        Args:
            halting: `Halting` before it.
            probability: `(B, T)` float32, what the unit says of `hidden`, or a mean of it.
            hidden: `(B, T, D)`.
            is_last: Whether no further iteration is allowed.
        """
        live, total = halting.live, halting.total
        reached = total + probability
        halts = live & ((reached >= self.confidence_threshold) | is_last)
        remainder = ops.where(halts, 1.0 - total, halting.remainder)
        mean = halting.mean
        if not isinstance(mean, tuple):
            weight = ops.where(live, ops.where(halts, remainder, probability), 0.0)
            mean = mean + weight[..., None] * ops.cast(hidden, "float32")
        return Halting(
            live=live & ops.logical_not(halts),
            total=ops.where(live, reached, total),
            iterations=halting.iterations + ops.cast(live, "int32"),
            remainder=remainder,
            mean=mean,
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape[:-1]

    def compute_output_spec(self, hidden: Any) -> keras.KerasTensor:
        return keras.KerasTensor(hidden.shape[:-1], dtype="float32")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "confidence_threshold": self.confidence_threshold,
            "initializer_range": self.initializer_range,
        }
