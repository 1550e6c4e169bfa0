"""The router of LoRA experts (MoDr): in which style a row thinks."""

from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.config.validation import require

from .arguments import RULES, check_arguments
from .checked_layer import CheckedLayer
from .initializers import Normal
from .ops.backend.autodiff import full_precision
from .ops.backend.replicas import sum_over_replicas
from .ops.checks import as_mask
from .ops.tensor_types import Tensor
from .projection import RowDense
from .shapes import Shape

NO_EXPERT = -1
UNFORCED = -2  # none was given, the router says which
EPSILON = 1e-6


@keras.saving.register_keras_serializable(package="qwen3_next")
class ExpertRouter(CheckedLayer):
    """Scores the LoRA experts of a think loop and balances how often each is chosen.

        u = [e / rms(e); s / rms(s)] W            e the encoder's output, s the think state
        r = sigmoid(mean of u over the prompt)    or of every token by itself
        n = argmax(r + b)                         b decides only who is chosen
        gate = 1 + (r_n - stop_gradient(r_n))     1 forward, the slope of r_n backward

    W is drawn with a standard deviation of 1 / sqrt(2 D), so that inputs are told apart from the
    beginning: experts that begin as equals would else all learn the mean of what they see. The
    selection bias b does not train: after every training step it moves up for experts that were
    chosen too rarely and down for the others.

    Args:
        num_experts: Experts N.
        granularity: `"sequence"`, where a row chooses by its prompt, or `"token"`.
        bias_update_rate: Step of the selection bias.

    Call arguments:
        encoded: `(B, T, D)`, e.
        hidden: `(B, T, D)`, s.
        prompt: `(B, T)` bool, true at the real tokens of the prompt; not read by `"token"`.

    Returns:
        r, `(B, 1, N)` or `(B, T, N)` float32 under every dtype policy.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import ExpertRouter

        router = ExpertRouter(num_experts=4)
        x = np.ones((2, 5, 8), "float32")
        scores = router(x, x, np.ones((2, 5), bool))
        assert router.select(scores).shape == (2, 1)
        ```

    Reference: MoDr, Mixture-of-Depth-Recurrent Transformers (ICLR 2026); auxiliary-loss-free load
    balancing, arXiv 2408.15664.
    """

    def __init__(
        self,
        num_experts: int,
        granularity: str = "sequence",
        bias_update_rate: float = 0.001,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.num_experts = num_experts
        self.granularity = granularity
        self.bias_update_rate = bias_update_rate

    def build(
        self,
        encoded_shape: Shape,
        hidden_shape: Shape | None = None,
        prompt_shape: Shape | None = None,
    ) -> None:
        self.score = RowDense(
            self.num_experts,
            use_bias=False,
            kernel_initializer=Normal((2 * encoded_shape[-1]) ** -0.5),
            name="score",
            dtype="float32",
        )
        self.score.build((None, None, 2 * encoded_shape[-1]))
        options = {"shape": (self.num_experts,), "initializer": "zeros", "dtype": "float32"}
        self.selection_bias = self.add_weight(name="selection_bias", trainable=False, **options)
        self.selected = self.add_weight(name="selected", trainable=False, **options)

    def call(
        self,
        encoded: Annotated[Tensor, "B T D"],
        hidden: Annotated[Tensor, "B T D"],
        prompt: Annotated[Tensor, "B T"] | None = None,
    ) -> Annotated[Tensor, "B T N"]:
        both = ops.concatenate([_normed(encoded), _normed(hidden)], axis=-1)
        with full_precision():
            if self.granularity == "sequence":
                real = as_mask(prompt)
                weight = ops.ones_like(both[..., :1]) if real is None else real[..., None]
                weight = ops.cast(weight, "float32")
                count = ops.maximum(ops.sum(weight, axis=1, keepdims=True), 1.0)
                both = ops.sum(both * weight, axis=1, keepdims=True) / count
            return ops.sigmoid(self.score(both))

    def select(self, scores: Annotated[Tensor, "B T N"]) -> Annotated[Tensor, "B T"]:
        """The experts chosen, int32."""
        biased = scores + ops.convert_to_tensor(self.selection_bias)
        return ops.cast(ops.argmax(biased, axis=-1), "int32")

    def weigh(
        self, chosen: Annotated[Tensor, "B T"], scores: Annotated[Tensor, "B T N"] | None
    ) -> Annotated[Tensor, "B T N"]:
        """1 for the chosen expert and 0 for the others, all 0 for `NO_EXPERT`; with `scores` their
        gradient goes straight through to them."""
        experts = ops.arange(self.num_experts, dtype="int32")
        weights = ops.cast(chosen[..., None] == experts, "float32")
        if scores is None:
            return weights
        return weights * (1.0 + (scores - ops.stop_gradient(scores)))

    def count(self, selections: Annotated[Tensor, "B N"]) -> None:
        """Notes how often each expert was chosen, for the next `update_bias`."""
        self.selected.assign_add(ops.sum(selections, axis=0))

    def update_bias(self, rate: float | None = None) -> None:
        """`b_n += rate * sign(mean of the counts - count_n)`, over what was noted since the last
        time; `rate` defaults to `bias_update_rate` and must be at least 0 as well. With
        `trainable=False` the bias stays as it is."""
        rate = self.bias_update_rate if rate is None else rate
        require(RULES["bias_update_rate"], "rate", rate)
        counts = sum_over_replicas(ops.convert_to_tensor(self.selected))
        if self.trainable:
            self.selection_bias.assign_add(rate * ops.sign(ops.mean(counts) - counts))
        self.selected.assign(ops.zeros_like(counts))

    def compute_output_shape(
        self,
        encoded_shape: Shape,
        hidden_shape: Shape | None = None,
        prompt_shape: Shape | None = None,
    ) -> Shape:
        length = encoded_shape[1] if self.granularity == "token" else 1
        return (encoded_shape[0], length, self.num_experts)

    def compute_output_spec(self, encoded: Any, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(self.compute_output_shape(encoded.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "granularity": self.granularity,
            "bias_update_rate": self.bias_update_rate,
        }


def _normed(x: Tensor) -> Tensor:
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + EPSILON)
