"""Gated attention, the softmax mixer of Qwen3-Next."""

from typing import NamedTuple

import keras
from keras import ops

from .norms import make_norm
from .ops import attention
from .ops.backend.loops import scatter_rows
from .ops.backend.seeds import DrawnSeed
from .ops.sequence import segment_index, segment_positions
from .partial_rotary_embedding import PartialRotaryEmbedding, rotary_dim
from .projection import from_heads, to_heads


class AttentionCache(NamedTuple):
    """Keys (rotated) and values of the tokens absorbed so far, `(B, S, G, D)` each."""

    keys: object
    values: object


@keras.saving.register_keras_serializable(package="qwen3_next")
class GatedAttention(keras.layers.Layer):
    """Causal grouped-query attention with normed queries and keys and an output gate.

        q, gate = split(x W_q)            per head
        q, k = rope(norm(q)), rope(norm(k))
        o = softmax(q k^T / sqrt(D) + causal) v
        y = (o * sigmoid(gate)) W_o

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

    Call arguments:
        x: `(B, T, width)`.
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: `AttentionCache` to read and extend, or `None`.
        lengths: `(B,)` int32, tokens already in the cache; required with a cache.
        dropout_seed: Seed tensor for the dropout where the layer may not draw it itself.
        training: Whether to apply dropout.

    Returns:
        `(B, T, width)`, with a cache `(output, cache)`.

    Reference: Gated Attention for Large Language Models, arXiv 2505.06708 (gate G1).
    """

    def __init__(
        self,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        output_gate=True,
        partial_rotary_factor=0.25,
        rope_theta=10000.0,
        normalization_type="zero_centered_rms_norm",
        rms_norm_eps=1e-6,
        attention_dropout=0.0,
        initializer_range=0.02,
        **kwargs,
    ):
        # Inputs are cast by hand: Keras would cast the float tensors of a cache as well.
        super().__init__(autocast=False, **kwargs)
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`. "
                f"Received: {num_attention_heads=}, {num_key_value_heads=}"
            )
        rotary_dim(head_dim, partial_rotary_factor)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.output_gate = output_gate
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rope_theta
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.seed_generator = keras.random.SeedGenerator() if attention_dropout else None

    def build(self, input_shape):
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

    def init_cache(self, batch_size, max_length):
        """An empty cache for `max_length` tokens a row, in the compute dtype."""
        shape = (batch_size, max_length, self.num_key_value_heads, self.head_dim)
        return AttentionCache(
            ops.zeros(shape, self.compute_dtype), ops.zeros(shape, self.compute_dtype)
        )

    def call(
        self,
        x,
        padding_mask=None,
        segment_ids=None,
        cache=None,
        lengths=None,
        dropout_seed=None,
        training=None,
    ):
        x = ops.cast(x, self.compute_dtype)
        query = self.q_proj(x)
        gate = None
        if self.output_gate:
            query, gate = ops.split(query, 2, axis=-1)
        if cache is None:
            segment = None if segment_ids is None else segment_index(segment_ids, padding_mask)
            positions = _positions(x, segment, padding_mask)
        elif lengths is None or segment_ids is not None:
            raise ValueError(
                "With a `cache`, `lengths` is required and `segment_ids` must be None: a cache holds "
                f"one sequence a row. Received: lengths={lengths}, segment_ids={segment_ids}"
            )
        else:
            positions = lengths[:, None] + _positions(x, None, padding_mask)
        query = self.rotary(self.q_norm(query), positions)
        key = self.rotary(self.k_norm(self.k_proj(x)), positions)
        value = self.v_proj(x)
        if cache is None:
            visible = {"key_mask": padding_mask}
            if segment is not None:
                visible |= {"query_segments": segment, "key_segments": segment}
        else:
            cache = _extend(cache, key, value, positions, padding_mask)
            key, value = cache
            visible = {"limits": positions}
        if training and self.attention_dropout:
            output = self._attend_with_dropout(query, key, value, visible, dropout_seed)
        else:
            output = attention(query, key, value, **visible)
        if gate is not None:
            gate = ops.sigmoid(ops.cast(gate, "float32"))
            output = ops.cast(ops.cast(output, "float32") * gate, self.compute_dtype)
        output = self.o_proj(output)
        return output if cache is None else (output, cache)

    def commit(self, cache, extended, counts):
        """The cache after a pass of which only some tokens stay.

        That is the extended one: what is behind a row's length is not read, and overwritten.
        """
        del cache, counts
        return extended

    def _attend_with_dropout(self, query, key, value, visible, seed):
        """As `attention`, but with all weights in memory, where some of them are dropped."""
        seed = self.seed_generator.next() if seed is None else seed
        batch, length, heads, dim = ops.shape(query)
        groups = self.num_key_value_heads
        query = ops.reshape(query, (batch, length, groups, heads // groups, dim))
        scores = ops.cast(ops.einsum("btgrd,bsgd->bgrts", query, key), "float32") * dim**-0.5
        mask = _mask(length, ops.shape(key)[1], **visible)
        scores = ops.where(mask[:, None, None], scores, -1e30)
        weights = keras.random.dropout(
            ops.softmax(scores), self.attention_dropout, seed=DrawnSeed(seed)
        )
        output = ops.einsum("bgrts,bsgd->btgrd", ops.cast(weights, value.dtype), value)
        return ops.reshape(output, (batch, length, heads, dim))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "output_gate": self.output_gate,
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_theta": self.rope_theta,
            "normalization_type": self.normalization_type,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_dropout": self.attention_dropout,
            "initializer_range": self.initializer_range,
        }


def _positions(x, segment, padding_mask):
    """`(B, T)` or `(1, T)` int32 positions within a segment, counting real tokens."""
    if segment is None and padding_mask is None:
        return ops.arange(ops.shape(x)[1], dtype="int32")[None]
    return segment_positions(segment, padding_mask)


def _mask(length, keys, limits=None, key_mask=None, query_segments=None, key_segments=None):
    """`(B or 1, T, S)` bool: which keys a token sees, by the rules of `attention`."""
    limits = ops.arange(length, dtype="int32")[None] if limits is None else limits
    mask = ops.arange(keys, dtype="int32") <= limits[..., None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    if query_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask


def _extend(cache, key, value, positions, padding_mask):
    """Writes the new keys and values behind those of every row."""
    batch, capacity, groups, dim = ops.shape(cache.keys)
    positions = ops.broadcast_to(positions, ops.shape(key)[:2])
    fits = positions < capacity
    if padding_mask is not None:
        fits = fits & padding_mask
    rows = ops.expand_dims(ops.arange(batch, dtype="int32") * capacity, -1)
    index = ops.reshape(ops.where(fits, rows + positions, batch * capacity), (-1,))

    def write(buffer, new):
        flat = ops.reshape(buffer, (-1, groups, dim))
        flat = scatter_rows(
            flat, index, ops.reshape(ops.cast(new, buffer.dtype), (-1, groups, dim))
        )
        return ops.reshape(flat, ops.shape(buffer))

    return AttentionCache(write(cache.keys, key), write(cache.values, value))
