"""LoRA experts: several low-rank changes of one projection."""

import math
from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.config.validation import integer, require

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .initializers import Normal
from .ops.backend.seeds import DrawnSeed
from .ops.checks import require_shape
from .ops.tensor_types import Tensor
from .shapes import Shape


@keras.saving.register_keras_serializable(package="qwen3_next")
class LoRAExperts(CheckedLayer):
    """What low-rank experts add to the output of a projection.

        y = (alpha / rank) sum_n w_n (x A_n) B_n

    so that a projection W of the same input becomes `W + (alpha / rank) A_n B_n` where expert n
    has weight 1. All experts are two products. B is zero at first: new experts change nothing.

    Args:
        num_experts: Experts N.
        rank: Rank of each.
        output_shape: Dims of the projection's output behind `(B, T)`.
        alpha: Scale, times the rank.
        dropout: Dropout rate on x in training.
        initializer_range: Standard deviation of the initial A.

    Call arguments:
        x: `(B, T, ...)`, the input of the projection; what is behind `(B, T)` is one axis here.
        weights: `(B, 1, N)` or `(B, T, N)`, the weight of every expert.
        dropout_seed: Seed tensor for the dropout where the layer may not draw it itself, or `None`.
        training: Whether to apply dropout.

    Returns:
        `(B, T, *output_shape)` in the compute dtype.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import LoRAExperts

        experts = LoRAExperts(num_experts=4, rank=2, output_shape=(2, 8))
        weights = np.eye(4, dtype="float32")[None, :1]  # expert 0 for the only row
        assert experts(np.ones((1, 3, 16), "float32"), weights).shape == (1, 3, 2, 8)
        ```

    Reference: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self,
        num_experts: int,
        rank: int,
        output_shape: tuple[int, ...],
        alpha: float = 32.0,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.num_experts = num_experts
        self.rank = rank
        self.dims = tuple(output_shape)
        self.alpha = alpha
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.seed_generator: Any = keras.random.SeedGenerator() if dropout else None

    def build(self, x_shape: Shape, weights_shape: Shape | None = None) -> None:
        width = math.prod(x_shape[2:])
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(width, self.num_experts, self.rank),
            initializer=Normal(self.initializer_range),
        )
        outputs = math.prod(self.dims)
        self.lora_b = self.add_weight(
            name="lora_b", shape=(self.num_experts, self.rank, outputs), initializer="zeros"
        )

    def draw_dropout_seed(self, training: bool | None) -> Tensor | None:
        """A new seed for `call`, or `None` where nothing is dropped."""
        return self.seed_generator.next() if training and self.dropout else None

    def call(
        self,
        x: Annotated[Tensor, "B T ..."],
        weights: Annotated[Tensor, "B T|1 N"],
        dropout_seed: Tensor | None = None,
        training: bool | None = None,
    ) -> Annotated[Tensor, "B T ..."]:
        width = self.lora_a.shape[0]
        if math.prod(x.shape[2:]) != width:
            raise ValueError(
                f"`x` must hold {width} numbers per token. Received: x.shape={tuple(x.shape)}"
            )
        require_shape("weights", weights, (None, None, self.num_experts))
        batch, length = ops.shape(x)[:2]
        flat = ops.reshape(ops.cast(x, self.compute_dtype), (batch, length, width))
        if dropout_seed is None:
            dropout_seed = self.draw_dropout_seed(training)
        if dropout_seed is not None:
            flat = keras.random.dropout(flat, self.dropout, seed=DrawnSeed(dropout_seed))
        weights = ops.cast(weights * (self.alpha / self.rank), self.compute_dtype)
        inner = ops.einsum("btd,dnr->btnr", flat, ops.cast(self.lora_a, self.compute_dtype))
        kernel = ops.cast(self.lora_b, self.compute_dtype)
        delta = ops.einsum("btnr,nro->bto", inner * weights[..., None], kernel)
        return ops.reshape(delta, (batch, length, *self.dims))

    def merged(self, expert: int) -> Annotated[Tensor, "D O"]:
        """`(alpha / rank) A_n B_n`, what to add to a kernel to build an expert in."""
        require(integer(0, self.num_experts - 1), "expert", expert)
        kernel = ops.matmul(self.lora_a[:, expert], self.lora_b[expert])
        return kernel * (self.alpha / self.rank)

    def compute_output_shape(self, x_shape: Shape, weights_shape: Shape | None = None) -> Shape:
        return (*x_shape[:2], *self.dims)

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*x.shape[:2], *self.dims), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "rank": self.rank,
            "output_shape": list(self.dims),
            "alpha": self.alpha,
            "dropout": self.dropout,
            "initializer_range": self.initializer_range,
        }
