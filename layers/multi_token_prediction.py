"""One step of multi-token prediction (MTP)."""

from typing import Annotated, Any, NamedTuple, Self

import keras
from keras import ops

from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .decoder_layer import DecoderLayer, LayerCache
from .norms import make_norm
from .ops.tensor_types import Tensor
from .projection import dense
from .shapes import Shape, spec_like


class MTPOutput(NamedTuple):
    """What one step gives.

    Attributes:
        hidden: `(B, T, D)` in the compute dtype, which the next step and the head read.
        cache: `AttentionCache` of the body with the new pairs, or `()` without one.
    """

    hidden: Annotated[Tensor, "B T D"]
    cache: LayerCache | tuple[()]


@keras.saving.register_keras_serializable(package="qwen3_next")
class MultiTokenPrediction(CheckedLayer):
    """Turns what is known at a token, and the next token, into what is known one token later.

        x_i = W [norm_e(embedding_i); norm_h(hidden_i)]      the embedding stands first
        y_i = norm(body(x_i))

    `hidden_i` is the backbone's output at token i, or this layer's own output of the step before,
    and `embedding_i` that of the token that follows. The language-model head makes of y_i the
    token after that one.

    Args:
        body: A `DecoderLayer` with full attention, a feed-forward layer such as `SwiGLU` (with a
            norm before it and a residual), or `None` for none.
        normalization_type: Kind of all norms, see `norms.NORMALIZATIONS`.
        rms_norm_eps: Epsilon of the norms.
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        embedding, hidden: `(B, T, D)`.
        padding_mask: `(B, T)` bool, true at real pairs, or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: `AttentionCache` of the body to read and extend, or `None`; only for a body with
            attention.
        lengths: `(B,)` int32, pairs already in the cache; required with a cache.
        full_output: Whether to return an `MTPOutput` without a cache, too.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `(B, T, D)`; with a cache or `full_output` an `MTPOutput(hidden, cache)`.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import MultiTokenPrediction, SwiGLU

        layer = MultiTokenPrediction(body=SwiGLU(intermediate_size=16))
        x = np.ones((1, 3, 8), "float32")
        assert layer(x, x).shape == (1, 3, 8)
        ```

    Reference: DeepSeek-V3, arXiv 2412.19437, section 2.2, in the form of the published Qwen3-Next.
    """

    def __init__(
        self,
        body: keras.layers.Layer | None = None,
        normalization_type: str = "zero_centered_rms_norm",
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        super().__init__(autocast=False, **kwargs)
        self.body = body
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range

    def build(self, embedding_shape: Shape, hidden_shape: Shape | None = None) -> None:
        width, policy = embedding_shape[-1], self.dtype_policy

        def norm(name: str) -> keras.layers.Layer:
            layer = make_norm(self.normalization_type, self.rms_norm_eps, name, policy)
            layer.build((None, None, width))
            return layer

        self.fc = dense(width, self.initializer_range, "fc", policy)
        self.fc.build((None, None, 2 * width))
        self.pre_fc_norm_embedding = norm("pre_fc_norm_embedding")
        self.pre_fc_norm_hidden = norm("pre_fc_norm_hidden")
        self.norm = norm("norm")
        if self.body is None:
            return
        if not self.body.built:
            self.body.build((None, None, width))
        if not isinstance(self.body, DecoderLayer):
            self.mlp_norm = norm("mlp_norm")

    def init_cache(self, batch_size: int, max_length: int) -> LayerCache | None:
        """An empty cache of the body for `max_length` pairs per row, `None` without attention."""
        if not isinstance(self.body, DecoderLayer):
            return None
        return self.body.init_cache(batch_size, max_length)

    def call(
        self,
        embedding: Annotated[Tensor, "B T D"],
        hidden: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: LayerCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        full_output: bool = False,
        training: bool | None = None,
    ) -> Annotated[Tensor, "B T D"] | MTPOutput:
        self._check_cache(cache)
        extended: Any = ()
        parts = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(ops.concatenate(parts, axis=-1))
        if isinstance(self.body, DecoderLayer):
            x, extended, _ = self.body(
                x,
                padding_mask=padding_mask,
                segment_ids=segment_ids,
                cache=cache,
                lengths=None if cache is None else lengths,
                full_output=True,
                training=training,
            )
        elif self.body is not None:
            x = x + self.body(self.mlp_norm(x))
        x = self.norm(x)
        return x if cache is None and not full_output else MTPOutput(x, extended)

    def _check_cache(self, cache: Any) -> None:
        if cache is not None and not isinstance(self.body, DecoderLayer):
            raise ValueError(
                "A `cache` is for a `body` with attention. "
                f"Received: cache of type {type(cache).__name__}, body={self.body}"
            )

    def compute_output_shape(
        self, embedding_shape: Shape, hidden_shape: Shape | None = None
    ) -> Shape:
        return embedding_shape

    def compute_output_spec(
        self,
        embedding: Any,
        hidden: Any,
        padding_mask: Any = None,
        segment_ids: Any = None,
        cache: Any = None,
        lengths: Any = None,
        full_output: bool = False,
        training: bool | None = None,
    ) -> Any:
        self._check_cache(cache)
        output: Any = spec_like(hidden, self.compute_dtype)
        extended: Any = ()
        if cache is not None and isinstance(self.body, DecoderLayer):
            context = {"segment_ids": segment_ids, "cache": cache, "lengths": lengths}
            extended = self.body.compute_output_spec(hidden, **context).cache
        return output if cache is None and not full_output else MTPOutput(output, extended)

    def get_config(self) -> dict[str, Any]:
        body = None if self.body is None else keras.saving.serialize_keras_object(self.body)
        return {
            **super().get_config(),
            "body": body,
            "normalization_type": self.normalization_type,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        body = config["body"]
        if body is not None:
            body = keras.saving.deserialize_keras_object(body)
        return cls(**{**config, "body": body})
