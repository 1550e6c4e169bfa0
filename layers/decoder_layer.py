"""One layer of the backbone: a token mixer and a feed-forward network, each with its residual."""

import dataclasses
from typing import Annotated, Any, NamedTuple, Self

import keras
from keras import ops

from .adapters import BLOCK_OUTPUT, Adapters
from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .gated_attention import AttentionCache, AttentionUpdate
from .gated_delta_net import DeltaNetCache, DeltaNetUpdate, GatedDeltaNet
from .mixer_context import MixerContext
from .norms import make_norm
from .ops.backend.remat import remat
from .ops.backend.seeds import DrawnSeed
from .ops.checks import as_mask
from .ops.tensor_types import Tensor
from .shapes import Shape, spec_like
from .sparse_moe import Routing, SparseMoE

LayerCache = AttentionCache | DeltaNetCache
LayerUpdate = AttentionUpdate | DeltaNetUpdate


class DropoutSeeds(NamedTuple):
    """What a pass through a decoder layer draws its dropout from; `None` where nothing is dropped.

    Attributes:
        mixer: Seed of the dropout inside the mixer.
        mixed: Seed of the residual branch of the mixer.
        fed: Seed of the residual branch of the feed-forward network.
    """

    mixer: Tensor | None = None
    mixed: Tensor | None = None
    fed: Tensor | None = None


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
class DecoderLayer(CheckedLayer):
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
        updates: `(B, T)` bool, tokens whose residual moves, or `None` for all. The mixer reads the
            others as they are; the feed-forward network leaves them out.
        dropout_seeds: `DropoutSeeds` where the layer may not draw them itself, or `None`.
        training: Whether to apply dropout and checkpointing.
        adapters: `Adapters` of the mixer's projections and of the layer's output, or `None`.

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
        check_arguments(locals())
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

    def empty_update(self, cache: LayerCache, length: int) -> LayerUpdate:
        """An update of the shapes that a replayable pass over `length` tokens returns."""
        return self.mixer.empty_update(cache, length)

    def write(self, x: Annotated[Tensor, "B T D"], **context: Any) -> LayerCache | LayerUpdate:
        """The cache, or the update, after tokens whose residual stands still: only the mixer reads
        them. The context is that of a mixer with a cache."""
        return self.mixer(self.input_layernorm(x), **context)[1]

    def draw_dropout_seeds(self, training: bool | None) -> DropoutSeeds:
        """New seeds for `call`."""
        mixer = self.mixer.draw_dropout_seed(training)
        if not training or not self.dropout:
            return DropoutSeeds(mixer)
        generator = self.residual_dropout.seed_generator
        return DropoutSeeds(mixer, generator.next(), generator.next())

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: LayerCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        full_output: bool = False,
        replayable: bool = False,
        updates: Annotated[Tensor, "B T"] | None = None,
        dropout_seeds: DropoutSeeds | None = None,
        training: bool | None = None,
        adapters: Adapters | None = None,
    ) -> Annotated[Tensor, "B T D"] | DecoderLayerOutput:
        x, updates = ops.cast(x, self.compute_dtype), as_mask(updates)
        # Drawn here, because a rematerialised function must not assign the generator.
        seeds = dropout_seeds or self.draw_dropout_seeds(training)
        context = MixerContext(
            padding_mask, segment_ids, cache, lengths, replayable, seeds.mixer, training
        )
        full_output = full_output or cache is not None
        routed, options = isinstance(self.mlp, SparseMoE), {}
        if routed:
            fed_tokens = both_masks(padding_mask, updates)
            options = {"padding_mask": fed_tokens, "return_routing": full_output}

        def mix(x: Tensor, *weights: Tensor) -> Any:
            own = None if adapters is None else dataclasses.replace(adapters, weights=weights[0])
            return self.mixer(self.input_layernorm(x), **context._replace(adapters=own)._asdict())

        def feed(x: Tensor) -> Any:
            return self.mlp(self.post_attention_layernorm(x), **options)

        recompute = self.gradient_checkpointing and training
        experts = () if adapters is None else tuple(adapters.experts.values())
        run_mix = remat(mix, (self.input_layernorm, self.mixer, *experts)) if recompute else mix
        run_feed = remat(feed, (self.post_attention_layernorm, self.mlp)) if recompute else feed
        mixed = run_mix(x) if adapters is None else run_mix(x, adapters.weights)
        mixed, left = (mixed, ()) if cache is None else mixed
        hidden = self._add(x, mixed, seeds.mixed, updates)
        fed = run_feed(hidden)
        fed, routing = fed if routed and full_output else (fed, ())
        hidden = self._add(hidden, fed, seeds.fed, updates)
        delta = None if adapters is None else adapters.delta(BLOCK_OUTPUT, hidden)
        if delta is not None:
            hidden = self._add(hidden, delta, None, updates)
        return DecoderLayerOutput(hidden, left, routing) if full_output else hidden

    def _add(
        self, x: Tensor, branch: Tensor, seed: Tensor | None, updates: Tensor | None
    ) -> Tensor:
        branch = ops.cast(branch, x.dtype)  # sublayers may have a policy of their own
        if seed is not None:
            branch = keras.random.dropout(branch, self.dropout, seed=DrawnSeed(seed))
        if updates is None:
            return x + branch
        return ops.where(updates[..., None], x + branch, x)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(
        self,
        x: Any,
        *args: Any,
        full_output: bool = False,
        updates: Any = None,
        dropout_seeds: Any = None,
        adapters: Any = None,
        **kwargs: Any,
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


def both_masks(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where both hold; `None` for a mask that always does."""
    mask, other = as_mask(mask), as_mask(other)
    return other if mask is None else mask if other is None else mask & other
