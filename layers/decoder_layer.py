"""One layer of the backbone: a token mixer and a feed-forward network, each with its residual."""

from typing import Annotated, Any, NamedTuple, Self

import keras
from keras import ops

from .gated_attention import AttentionCache, AttentionUpdate
from .gated_delta_net import DeltaNetCache, DeltaNetUpdate, GatedDeltaNet
from .mixer_context import MixerContext
from .norms import make_norm
from .ops.tensor_types import Tensor
from .shapes import Shape, spec_like
from .sparse_moe import Routing, SparseMoE

LayerCache = AttentionCache | DeltaNetCache
LayerUpdate = AttentionUpdate | DeltaNetUpdate


class DecoderLayerOutput(NamedTuple):
    """What a pass through a decoder layer gives.

    What there is not is an empty tuple, which Keras takes among the outputs of a functional model.

    Attributes:
        hidden: `(B, T, D)` in the compute dtype.
        cache: The mixer's cache with the new tokens, its update in a replayable pass, `()` without
            a cache.
        routing: `Routing` statistics of a `SparseMoE`, `()` for another feed-forward network.
    """

    hidden: Annotated[Tensor, "B T D"]
    cache: LayerCache | LayerUpdate | tuple[()]
    routing: Routing | tuple[()]


@keras.saving.register_keras_serializable(package="qwen3_next")
class DecoderLayer(keras.layers.Layer):
    """A pre-norm decoder layer with two residuals.

        h = x + dropout(mixer(norm_1(x)))
        y = h + dropout(mlp(norm_2(h)))

    Args:
        mixer: Token mixer, a `GatedDeltaNet` or a `GatedAttention`. Its name stands in the paths
            of the weights; the published ones are `linear_attn` and `self_attn`.
        mlp: Feed-forward network, a `SparseMoE` or a `SwiGLU`.
        normalization_type: Norm before each of them, see `norms.NORMALIZATIONS`.
        rms_norm_eps: Epsilon of the norms.
        dropout: Dropout rate on each residual branch in training.
        gradient_checkpointing: Whether training keeps only the input of each residual branch and
            recomputes the rest in the backward pass.

    Call arguments:
        x: `(B, T, D)`.
        padding_mask: `(B, T)` bool, true at real tokens, or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: The mixer's cache to continue from, or `None`.
        lengths: `(B,)` int32, tokens already in the cache, or `None`.
        full_output: Whether to return a `DecoderLayerOutput` without a cache, too.
        replayable: Whether the pass may be taken back: it then returns an update for `commit`
            in place of the next cache.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `(B, T, D)`; with a cache or `full_output` a `DecoderLayerOutput(hidden, cache, routing)`.

    Example:
        ```python
        import numpy as np
        from qwen3_next.layers import DecoderLayer, GatedAttention, SwiGLU

        mixer = GatedAttention(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        layer = DecoderLayer(mixer, SwiGLU(intermediate_size=16))
        x = np.ones((1, 3, 8), "float32")
        assert layer(x).shape == (1, 3, 8)

        cache = layer.init_cache(batch_size=1, max_length=4)
        output = layer(x, cache=cache, lengths=np.zeros(1, "int32"))
        assert output.cache.keys.shape == cache.keys.shape
        assert output.routing == ()
        ```
    """

    def __init__(
        self,
        mixer: keras.layers.Layer,
        mlp: keras.layers.Layer,
        normalization_type: str = "zero_centered_rms_norm",
        rms_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.mixer = mixer
        self.mlp = mlp
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.input_layernorm = self._norm("input_layernorm")
        self.post_attention_layernorm = self._norm("post_attention_layernorm")
        self.residual_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    @property
    def linear_attn(self) -> GatedDeltaNet | None:
        """The mixer if it is a `GatedDeltaNet`."""
        # Keras files weights under the first attribute, by letter, that leads to them: files keep
        # those of a Gated DeltaNet under `linear_attn` and those of an attention under `mixer`.
        return self.mixer if isinstance(self.mixer, GatedDeltaNet) else None

    def _norm(self, name: str) -> keras.layers.Layer:
        return make_norm(self.normalization_type, self.rms_norm_eps, name, self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        shape = (None, None, input_shape[-1])
        for layer in (
            self.input_layernorm,
            self.mixer,
            self.post_attention_layernorm,
            self.mlp,
            self.residual_dropout,
        ):
            if not layer.built:  # deserialization builds the two that are given
                layer.build(shape)

    def init_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """The mixer's cache for empty rows of up to `max_length` tokens."""
        return self.mixer.init_cache(batch_size, max_length)

    def commit(
        self, cache: LayerCache, update: LayerUpdate, counts: Annotated[Tensor, "B"]
    ) -> LayerCache:
        """The cache after the first tokens of a replayable pass.

        Args:
            cache: The mixer's cache that the pass began with.
            update: `AttentionUpdate` or `DeltaNetUpdate` that it returned.
            counts: `(B,)` int32, tokens of every row that stay.

        Returns:
            `AttentionCache` or `DeltaNetCache`.
        """
        return self.mixer.commit(cache, update, counts)

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: LayerCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        full_output: bool = False,
        replayable: bool = False,
        training: bool | None = None,
    ) -> Annotated[Tensor, "B T D"] | DecoderLayerOutput:
        x = ops.cast(x, self.compute_dtype)
        # The seed is drawn here, because a rematerialised function must not assign the generator.
        seed = self.mixer.draw_dropout_seed(training)
        context = MixerContext(
            padding_mask, segment_ids, cache, lengths, replayable, seed, training
        )
        full_output = full_output or cache is not None
        routed = isinstance(self.mlp, SparseMoE)
        options = {"padding_mask": padding_mask, "return_routing": full_output} if routed else {}

        def mix(x: Tensor) -> Any:
            return self.mixer(self.input_layernorm(x), **context._asdict())

        def feed_forward(x: Tensor) -> Any:
            return self.mlp(self.post_attention_layernorm(x), **options)

        if self.gradient_checkpointing and training:
            mix, feed_forward = keras.remat(mix), keras.remat(feed_forward)
        mixed = mix(x)
        mixed, left = (mixed, ()) if cache is None else mixed
        hidden = x + self.residual_dropout(mixed, training=training)
        fed = feed_forward(hidden)
        fed, routing = fed if routed and full_output else (fed, ())
        hidden = hidden + self.residual_dropout(fed, training=training)
        return DecoderLayerOutput(hidden, left, routing) if full_output else hidden

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(
        self, x: Any, *args: Any, full_output: bool = False, **kwargs: Any
    ) -> Any:
        context = MixerContext(*args, **kwargs)
        mixed = self.mixer.compute_output_spec(x, **context._asdict())
        hidden, cached = spec_like(x, self.compute_dtype), context.cache is not None
        if not cached and not full_output:
            return hidden
        routing: Any = ()
        if isinstance(self.mlp, SparseMoE):
            _, routing = self.mlp.compute_output_spec(x, return_routing=True)
        return DecoderLayerOutput(hidden, mixed[1] if cached else (), routing)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "mixer": serialize(self.mixer),
            "mlp": serialize(self.mlp),
            "normalization_type": self.normalization_type,
            "rms_norm_eps": self.rms_norm_eps,
            "dropout": self.dropout,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        deserialize = keras.saving.deserialize_keras_object
        mixer, mlp = deserialize(config["mixer"]), deserialize(config["mlp"])
        return cls(**{**config, "mixer": mixer, "mlp": mlp})
