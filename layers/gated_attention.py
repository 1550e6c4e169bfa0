"""Gated attention, the softmax mixer of Qwen3-Next."""

from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .adapters import Adapters, project
from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .mixer_context import MixerContext, check_context
from .norms import make_norm
from .ops import attention
from .ops.backend.loops import scatter_rows
from .ops.backend.sharding import devices, on_shards, spec, zeros
from .ops.checks import as_mask
from .ops.sequence import segment_index, segment_positions
from .ops.tensor_types import Tensor
from .partial_rotary_embedding import PartialRotaryEmbedding, rotary_dim
from .projection import from_heads, to_heads
from .shapes import Shape, spec_like


class AttentionCache(NamedTuple):
    """What attention keeps of the tokens it has read, in buffers of fixed size.

    Attributes:
        keys: `(B, S, G, D)` in the compute dtype, rotated.
        values: `(B, S, G, D)` in the compute dtype.
    """

    keys: Annotated[Tensor, "B S G D"]
    values: Annotated[Tensor, "B S G D"]


class AttentionUpdate(NamedTuple):
    """What a replayable pass leaves: `GatedAttention.commit` turns it into a cache.

    Attributes:
        keys: `(B, S, G, D)`, the keys of the cache with those of the pass behind them.
        values: `(B, S, G, D)`, the values likewise.
    """

    keys: Annotated[Tensor, "B S G D"]
    values: Annotated[Tensor, "B S G D"]


@keras.saving.register_keras_serializable(package="qwen3_next")
class GatedAttention(CheckedLayer):
    """Causal grouped-query attention with normed queries and keys and an output gate.

        q, gate = split(x W_q)            per head
        q, k = rope(norm(q)), rope(norm(k))
        o = softmax(q k^T / sqrt(D) + causal) v
        y = (o * sigmoid(gate + b)) W_o

    With `output_gate=False` and full rotary dims it is the attention of Qwen3.

    Args:
        num_attention_heads: Query heads H.
        num_key_value_heads: Key and value heads G, a divisor of H.
        head_dim: Width D of a head, independent of the width of x.
        output_gate: Whether W_q also makes the gate.
        partial_rotary_factor: Fraction of D that is rotated.
        rope_theta: Base of the rotary wavelengths.
        normalization_type: Norm of queries and keys, see `norms.NORMALIZATIONS`.
        rms_norm_eps: Epsilon of the norms.
        attention_dropout: Dropout rate on the attention weights in training.
        initializer_range: Standard deviation of the normal initial weights.
        gate_bias: Initial value of the gate's bias b, one per channel; `None` for no bias, as
            published.

    Call arguments:
        x: `(B, T, width)`.
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: `AttentionCache` to read and extend, or `None`. It holds one sequence per row, so
            `segment_ids` must be `None` with it.
        lengths: `(B,)` int32, tokens already in the cache; required with a cache.
        replayable: Whether to return an `AttentionUpdate` for `commit` in place of the next cache.
        dropout_seed: Seed tensor for the dropout where the layer may not draw it itself, or
            `None`.
        training: Whether to apply dropout.
        adapters: `Adapters` of `q_proj`, `k_proj`, `v_proj` and `o_proj`, or `None`.

    Returns:
        `(B, T, width)`, with a cache `(output, AttentionCache)`, in a replayable pass
        `(output, AttentionUpdate)`.

    Example:
        ```python
        import numpy as np
        from keras import ops
        from qwen3_next.layers import GatedAttention

        layer = GatedAttention(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
        y = layer(x)
        assert y.shape == x.shape

        cache = layer.init_cache(batch_size=1, max_length=5)
        cached, cache = layer(x, cache=cache, lengths=np.zeros(1, "int32"))
        assert ops.max(ops.abs(cached - y)) < 1e-5
        ```

    Reference: Gated Attention for Large Language Models, arXiv 2505.06708 (gate G1).
    """

    def __init__(
        self,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        output_gate: bool = True,
        partial_rotary_factor: float = 0.25,
        rope_theta: float = 10000.0,
        normalization_type: str = "zero_centered_rms_norm",
        rms_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        gate_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        # Inputs are cast by hand: Keras would cast the float tensors of a cache as well.
        super().__init__(autocast=False, **kwargs)
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`. "
                f"Received: {num_attention_heads=}, {num_key_value_heads=}"
            )
        if gate_bias is not None and not output_gate:
            raise ValueError(
                f"`gate_bias` needs `output_gate=True`. Received: {gate_bias=}, {output_gate=}"
            )
        rotary_dim(head_dim, partial_rotary_factor)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.output_gate = output_gate
        self.initial_gate_bias = gate_bias
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rope_theta
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.seed_generator: Any = keras.random.SeedGenerator() if attention_dropout else None

    def build(self, input_shape: Shape) -> None:
        width, dim, policy = input_shape[-1], self.head_dim, self.dtype_policy
        std = self.initializer_range
        query_dim = 2 * dim if self.output_gate else dim
        self.q_proj = to_heads(self.num_attention_heads, query_dim, std, "q_proj", policy)
        self.k_proj = to_heads(self.num_key_value_heads, dim, std, "k_proj", policy)
        self.v_proj = to_heads(self.num_key_value_heads, dim, std, "v_proj", policy)
        self.o_proj = from_heads(width, std, "o_proj", policy)
        self.q_norm = make_norm(self.normalization_type, self.rms_norm_eps, "q_norm", policy)
        self.k_norm = make_norm(self.normalization_type, self.rms_norm_eps, "k_norm", policy)
        self.rotary = PartialRotaryEmbedding(
            self.rope_theta, self.partial_rotary_factor, name="rotary", dtype=policy
        )
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            layer.build((None, None, width))
        self.o_proj.build((None, None, self.num_attention_heads, dim))
        self.q_norm.build((None, None, self.num_attention_heads, dim))
        self.k_norm.build((None, None, self.num_key_value_heads, dim))
        self.rotary.build((None, None, self.num_attention_heads, dim))
        self.gate_bias: Any = None
        if self.initial_gate_bias is not None:
            self.gate_bias = self.add_weight(
                name="gate_bias",
                shape=(self.num_attention_heads, dim),
                initializer=keras.initializers.Constant(self.initial_gate_bias),
                autocast=False,
            )

    def init_cache(self, batch_size: int, max_length: int) -> AttentionCache:
        """An empty cache for `max_length` tokens per row, in the compute dtype."""
        held = self._held_key_heads()
        shape = (batch_size, max_length, held, self.head_dim)
        return AttentionCache(*(zeros(shape, self.compute_dtype, 2, held) for _ in range(2)))

    def _held_key_heads(self) -> int:
        """Key heads of a cache: those of the layer, repeated where several devices share one."""
        found = devices()
        if found is None:
            return self.num_key_value_heads
        return found.key_heads(self.num_attention_heads, self.num_key_value_heads)

    def empty_update(self, cache: AttentionCache, length: int) -> AttentionUpdate:
        """An update of the shapes that a replayable pass over `length` tokens returns."""
        return AttentionUpdate(*map(ops.zeros_like, cache))

    def draw_dropout_seed(self, training: bool | None) -> Tensor | None:
        """A new seed for `call`, or `None` where nothing is dropped."""
        return self.seed_generator.next() if training and self.attention_dropout else None

    def projections(self) -> dict[str, keras.layers.EinsumDense]:
        """The projections that adapters may change."""
        return {name: getattr(self, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: AttentionCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        replayable: bool = False,
        dropout_seed: Tensor | None = None,
        training: bool | None = None,
        adapters: Adapters | None = None,
    ) -> Annotated[Tensor, "B T D"] | tuple[Tensor, AttentionCache | AttentionUpdate]:
        context = MixerContext(
            padding_mask, segment_ids, cache, lengths, replayable, dropout_seed, training, adapters
        )
        check_context(context, needs_lengths=True)
        x, padding_mask = ops.cast(x, self.compute_dtype), as_mask(padding_mask)
        segment = None if segment_ids is None else segment_index(segment_ids, padding_mask)
        positions = _positions(x, segment, padding_mask)
        if cache is not None:
            positions = ops.expand_dims(lengths, -1) + positions
        query, key, value, gate = self._read(x, positions, adapters)
        repeats = self._held_key_heads() // self.num_key_value_heads
        if repeats > 1:
            key, value = (ops.repeat(t, repeats, axis=2) for t in (key, value))
        if cache is None:
            visible = {"key_mask": padding_mask, "query_segments": segment, "key_segments": segment}
        else:
            cache = _extend(AttentionCache(*cache), key, value, positions, padding_mask)
            key, value = cache  # (B, S, G, D)
            visible = {"limits": positions}
        if dropout_seed is None:
            dropout_seed = self.draw_dropout_seed(training)
        dropout = self.attention_dropout if training else 0.0
        output = attention(query, key, value, dropout=dropout, dropout_seed=dropout_seed, **visible)
        if gate is not None:
            gate = ops.cast(gate, "float32")
            if self.gate_bias is not None:
                gate = gate + ops.cast(self.gate_bias, "float32")
            gate = ops.sigmoid(gate)
            output = ops.cast(ops.cast(output, "float32") * gate, self.compute_dtype)
        output = project(self, output, "o_proj", adapters)
        if cache is None:
            return output
        return output, AttentionUpdate(*cache) if replayable else cache

    def heads(
        self, x: Annotated[Tensor, "B T D"], padding_mask: Annotated[Tensor, "B T"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `(B, T, H, D)`, rotated keys and values `(B, T, G, D)` of rows."""
        x = ops.cast(x, self.compute_dtype)
        return self._read(x, _positions(x, None, as_mask(padding_mask)), None)[:3]

    def _read(
        self, x: Tensor, positions: Tensor, adapters: Adapters | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query, gate = project(self, x, "q_proj", adapters), None  # (B, T, H, D)
        if self.output_gate:
            query, gate = ops.split(query, 2, axis=-1)
        key = self.k_norm(project(self, x, "k_proj", adapters))  # (B, T, G, D)
        value = project(self, x, "v_proj", adapters)  # (B, T, G, D)
        return self.rotary(self.q_norm(query), positions), self.rotary(key, positions), value, gate

    def commit(
        self, cache: AttentionCache, update: AttentionUpdate, counts: Annotated[Tensor, "B"]
    ) -> AttentionCache:
        """The cache after a replayable pass of which only the first tokens stay.

        All keys and values of the pass stay where they are: what is behind a row's length is not
        read, and overwritten by the next tokens.

        Args:
            cache: `AttentionCache` the pass began with.
            update: `AttentionUpdate` that it returned.
            counts: `(B,)` int32, tokens of every row that stay.

        Returns:
            `AttentionCache`.
        """
        del cache, counts
        return AttentionCache(*update)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        context = MixerContext(*args, **kwargs)
        check_context(context, needs_lengths=True)
        output = spec_like(x, self.compute_dtype)
        if context.cache is None:
            return output
        kind = AttentionUpdate if context.replayable else AttentionCache
        return output, kind(*map(spec_like, context.cache))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "output_gate": self.output_gate,
            "gate_bias": self.initial_gate_bias,
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_theta": self.rope_theta,
            "normalization_type": self.normalization_type,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_dropout": self.attention_dropout,
            "initializer_range": self.initializer_range,
        }


def _positions(x: Tensor, segment: Tensor | None, padding_mask: Tensor | None) -> Tensor:
    """`(B, T)` or `(1, T)` int32 positions within a segment, counting real tokens."""
    if segment is None and padding_mask is None:
        return ops.arange(ops.shape(x)[1], dtype="int32")[None]
    return segment_positions(segment, padding_mask)


def _extend(
    cache: AttentionCache,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding_mask: Tensor | None,
) -> AttentionCache:
    """Writes the new keys and values behind those of every row."""
    batch, capacity, groups, _ = ops.shape(cache.keys)
    positions = ops.broadcast_to(positions, ops.shape(key)[:2])
    fits = positions < capacity
    if padding_mask is not None:
        fits = fits & padding_mask
    write, found = _write, devices()
    if found is not None:
        rows = spec(found.rows(batch))
        both = spec(found.rows(batch), (), found.heads(groups))
        write = on_shards(write, found.mesh, (both, both, rows, rows), both)
    return AttentionCache(
        write(cache.keys, key, positions, fits), write(cache.values, value, positions, fits)
    )


def _write(
    buffer: Annotated[Tensor, "B S G D"],
    new: Annotated[Tensor, "B T G D"],
    positions: Annotated[Tensor, "B T"],
    fits: Annotated[Tensor, "B T"],
) -> Annotated[Tensor, "B S G D"]:
    """`buffer` with the new rows at their positions, where they fit."""
    batch, capacity, *rest = ops.shape(buffer)
    rows = ops.expand_dims(ops.arange(batch, dtype="int32") * capacity, -1)
    index = ops.reshape(ops.where(fits, rows + positions, batch * capacity), (-1,))
    flat = ops.reshape(buffer, (-1, *rest))
    flat = scatter_rows(flat, index, ops.reshape(ops.cast(new, buffer.dtype), (-1, *rest)))
    return ops.reshape(flat, ops.shape(buffer))
