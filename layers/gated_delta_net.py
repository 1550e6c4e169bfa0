"""Gated DeltaNet, the linear mixer of Qwen3-Next."""

from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .adapters import Adapters, project
from .arguments import check_arguments
from .checked_layer import CheckedLayer
from .gated_rms_norm import GatedRMSNorm
from .initializers import LogUniform, Normal
from .mixer_context import MixerContext, check_context
from .ops import causal_conv1d, gated_delta_rule, gated_delta_rule_with_replay, replay
from .ops.backend.sharding import zeros
from .ops.gated_delta_rule import Replay, empty_replay
from .ops.tensor_types import Tensor
from .projection import from_heads, to_heads
from .shapes import Shape, spec_like

L2_EPSILON = 1e-6


class DeltaNetCache(NamedTuple):
    """What a Gated DeltaNet keeps of the tokens it has read.

    Attributes:
        conv: `(B, W-1, C)` in the compute dtype, the last inputs of the convolution.
        recurrent: `(B, H, K, V)` float32, one matrix per head.
    """

    conv: Annotated[Tensor, "B W-1 C"]
    recurrent: Annotated[Tensor, "B H K V"]


class DeltaNetUpdate(NamedTuple):
    """What a replayable pass leaves: `GatedDeltaNet.commit` turns it into a cache.

    Attributes:
        conv: `(B, W-1+T, C)` in the compute dtype, the inputs of the convolution with those before.
        rule: `Replay`, the float32 record of what every token writes into the recurrent state.
    """

    conv: Annotated[Tensor, "B W-1+T C"]
    rule: Replay


class _Read(NamedTuple):
    """What a Gated DeltaNet makes of its tokens before the rule runs.

    Attributes:
        channels: `(B, T, C)`, the inputs of the convolution.
        conv: What the convolution returned.
        gate: `(B, T, H, V)`, before its SiLU.
        inputs: Queries, keys, values, log-decays and betas, as the rule takes them.
    """

    channels: Tensor
    conv: Any
    gate: Tensor
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@keras.saving.register_keras_serializable(package="qwen3_next")
class GatedDeltaNet(CheckedLayer):
    """Linear attention with a gated delta rule.

        q, k, v, z = x W_qkvz              b, a = x W_ba
        q, k, v = silu(conv(q, k, v))      causal, depthwise
        q, k = q / |q|, k / |k|
        beta = sigmoid(b)                  g = -exp(A_log) softplus(a + dt_bias)
        o = gated_delta_rule(q / sqrt(K), k, v, g, beta)
        y = gated_rms_norm(o, z) W_o       per head

    G key heads serve H value heads: value head h uses key head `h // (H // G)`. Projections and
    convolution are laid out by key head, `[q | k | v of its heads | z of its heads]`, so that
    everything but the last product shards by head.

    Args:
        linear_num_key_heads: Key heads G.
        linear_num_value_heads: Value heads H, a multiple of G.
        linear_key_head_dim: Width K of queries and keys.
        linear_value_head_dim: Width V of values.
        linear_conv_kernel_dim: Taps W of the convolution.
        rms_norm_eps: Epsilon of the gated norm.
        initializer_range: Standard deviation of the normal initial weights.

    Call arguments:
        x: `(B, T, width)`.
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: `DeltaNetCache` to continue from, or `None`. It holds one sequence per row, so
            `segment_ids` must be `None` with it.
        replayable: Whether to return a `DeltaNetUpdate` for `commit` in place of the next cache.
            Real tokens must stand at the front of a row then.
        adapters: `Adapters` of `in_proj_qkvz`, `in_proj_ba` and `out_proj`, or `None`.
        lengths, dropout_seed, training: Ignored, there for a mixer's common signature: a state
            has no positions, and nothing is dropped.

    Returns:
        `(B, T, width)`, with a cache `(output, DeltaNetCache)`, in a replayable pass
        `(output, DeltaNetUpdate)`.

    Example:
        ```python
        import numpy as np
        from keras import ops
        from qwen3_next.layers import GatedDeltaNet

        layer = GatedDeltaNet(
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
        )
        x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype("float32")
        y = layer(x)
        assert y.shape == x.shape

        cached, cache = layer(x, cache=layer.init_cache(batch_size=1))
        assert ops.max(ops.abs(cached - y)) < 1e-5
        ```

    Reference: Gated Delta Networks, arXiv 2412.06464.
    """

    def __init__(
        self,
        linear_num_key_heads: int,
        linear_num_value_heads: int,
        linear_key_head_dim: int,
        linear_value_head_dim: int,
        linear_conv_kernel_dim: int = 4,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_arguments(locals())
        # Inputs are cast by hand: Keras would cast the float32 state of a cache as well.
        super().__init__(autocast=False, **kwargs)
        if linear_num_value_heads % linear_num_key_heads:
            raise ValueError(
                "`linear_num_value_heads` must be a multiple of `linear_num_key_heads`. "
                f"Received: {linear_num_value_heads=}, {linear_num_key_heads=}"
            )
        self.linear_num_key_heads = linear_num_key_heads
        self.linear_num_value_heads = linear_num_value_heads
        self.linear_key_head_dim = linear_key_head_dim
        self.linear_value_head_dim = linear_value_head_dim
        self.linear_conv_kernel_dim = linear_conv_kernel_dim
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.repeats = linear_num_value_heads // linear_num_key_heads
        # Channels per key head: its query, its key, and the values of its value heads.
        self.group_values = self.repeats * linear_value_head_dim
        self.group_channels = 2 * linear_key_head_dim + self.group_values

    def build(self, input_shape: Shape) -> None:
        width, policy, std = input_shape[-1], self.dtype_policy, self.initializer_range
        groups, heads = self.linear_num_key_heads, self.linear_num_value_heads
        qkvz = self.group_channels + self.group_values
        self.in_proj_qkvz = to_heads(groups, qkvz, std, "in_proj_qkvz", policy)
        self.in_proj_ba = to_heads(groups, 2 * self.repeats, std, "in_proj_ba", policy)
        self.in_proj_qkvz.build((None, None, width))
        self.in_proj_ba.build((None, None, width))
        self.conv1d = self.add_weight(
            name="conv1d",
            shape=(self.linear_conv_kernel_dim, groups, self.group_channels),
            initializer=Normal(std),
        )
        # Decay rates are float32 under every policy: in bfloat16 a small A rounds to 0, its
        # logarithm to -inf, and the head is dead for good. A ~ U(0.01, 16): from 0 on, a draw
        # could be a head that never decays.
        self.A_log = self.add_weight(
            name="A_log",
            shape=(heads,),
            initializer=LogUniform(0.01, 16.0),
            dtype="float32",
            autocast=False,
        )
        self.dt_bias = self.add_weight(
            name="dt_bias", shape=(heads,), initializer="ones", dtype="float32", autocast=False
        )
        self.norm = GatedRMSNorm(self.rms_norm_eps, name="norm", dtype=policy)
        self.norm.build((None, None, heads, self.linear_value_head_dim))
        self.out_proj = from_heads(width, std, "out_proj", policy)
        self.out_proj.build((None, None, heads, self.linear_value_head_dim))

    def init_cache(self, batch_size: int, max_length: int | None = None) -> DeltaNetCache:
        """The cache of empty rows; its size does not depend on `max_length`."""
        channels = self.linear_num_key_heads * self.group_channels
        conv = (batch_size, self.linear_conv_kernel_dim - 1, channels)
        heads = self.linear_num_value_heads
        recurrent = (batch_size, heads, self.linear_key_head_dim, self.linear_value_head_dim)
        groups = self.linear_num_key_heads
        return DeltaNetCache(
            zeros(conv, self.compute_dtype, heads=2, count=groups),
            zeros(recurrent, "float32", heads=1, count=groups),
        )

    def empty_update(self, cache: DeltaNetCache, length: int) -> DeltaNetUpdate:
        """An update of the shapes that a replayable pass over `length` tokens returns."""
        conv = ops.zeros_like(cache.conv[:, :1])
        added = ops.repeat(ops.cast(conv, self.compute_dtype), length, axis=1)
        before = ops.zeros_like(ops.cast(cache.conv, self.compute_dtype))
        return DeltaNetUpdate(
            ops.concatenate([before, added], axis=1),
            empty_replay(cache.recurrent, self.linear_num_key_heads, length),
        )

    def draw_dropout_seed(self, training: bool | None) -> None:
        """`None`: nothing inside a Gated DeltaNet is dropped."""
        return None

    def projections(self) -> dict[str, keras.layers.EinsumDense]:
        """The projections that adapters may change."""
        return {name: getattr(self, name) for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}

    def call(
        self,
        x: Annotated[Tensor, "B T D"],
        padding_mask: Annotated[Tensor, "B T"] | None = None,
        segment_ids: Annotated[Tensor, "B T"] | None = None,
        cache: DeltaNetCache | None = None,
        lengths: Annotated[Tensor, "B"] | None = None,
        replayable: bool = False,
        dropout_seed: Tensor | None = None,
        training: bool | None = None,
        adapters: Adapters | None = None,
    ) -> Annotated[Tensor, "B T D"] | tuple[Tensor, DeltaNetCache | DeltaNetUpdate]:
        context = MixerContext(
            padding_mask, segment_ids, cache, lengths, replayable, dropout_seed, training, adapters
        )
        check_context(context, needs_lengths=False)
        cache = None if cache is None else DeltaNetCache(*cache)
        channels, conv, gate, inputs = self._read(x, padding_mask, segment_ids, cache, adapters)
        left: DeltaNetCache | DeltaNetUpdate | None = None
        if cache is None:
            output, _ = gated_delta_rule(
                *inputs, padding_mask=padding_mask, segment_ids=segment_ids
            )
        elif replayable:
            output, record = gated_delta_rule_with_replay(
                *inputs, state=cache.recurrent, padding_mask=padding_mask
            )
            before = ops.cast(cache.conv, channels.dtype)
            left = DeltaNetUpdate(ops.concatenate([before, channels], axis=1), record)
        else:
            output, state = gated_delta_rule(
                *inputs, state=cache.recurrent, padding_mask=padding_mask
            )
            left = DeltaNetCache(conv.state, state)
        output = project(self, self.norm(output, gate), "out_proj", adapters)
        return output if left is None else (output, left)

    def head_outputs(
        self, x: Annotated[Tensor, "B T D"], padding_mask: Annotated[Tensor, "B T"] | None = None
    ) -> Annotated[Tensor, "B T H V"]:
        """What the delta rule gives for every head, before norm, gate and output projection."""
        inputs = self._read(x, padding_mask, None, None, None).inputs
        return gated_delta_rule(*inputs, padding_mask=padding_mask)[0]

    def _read(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        segment_ids: Tensor | None,
        cache: DeltaNetCache | None,
        adapters: Adapters | None,
    ) -> "_Read":
        x = ops.cast(x, self.compute_dtype)
        channels, gate = self._split(project(self, x, "in_proj_qkvz", adapters))
        conv = causal_conv1d(
            channels,
            ops.reshape(self.conv1d, (self.linear_conv_kernel_dim, -1)),
            state=None if cache is None else cache.conv,
            padding_mask=padding_mask,
            segment_ids=segment_ids,
        )
        beta, log_decay = self._gates(project(self, x, "in_proj_ba", adapters))
        inputs = (*self._heads(conv.output), log_decay, beta)
        return _Read(channels, conv, gate, inputs)

    def commit(
        self, cache: DeltaNetCache, update: DeltaNetUpdate, counts: Annotated[Tensor, "B"]
    ) -> DeltaNetCache:
        """The cache after the first tokens of a replayable pass.

        Args:
            cache: `DeltaNetCache` the pass began with.
            update: `DeltaNetUpdate` that it returned.
            counts: `(B,)` int32, tokens of every row that stay.

        Returns:
            `DeltaNetCache`.
        """
        taps = ops.arange(self.linear_conv_kernel_dim - 1, dtype="int32")
        places = (counts[:, None] + taps)[..., None]
        conv = ops.take_along_axis(update.conv, places, axis=1)
        return DeltaNetCache(
            ops.cast(conv, cache.conv.dtype), replay(cache.recurrent, update.rule, counts)
        )

    def _split(self, qkvz: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, T, G, 2K + 2RV)` -> channels `(B, T, C = G (2K + RV))` and gate `(B, T, H, V)`."""
        batch, length, groups, _ = ops.shape(qkvz)
        # Gradients of a split are joined; those of slices are filled up with zeros and added.
        channels, gate = ops.split(qkvz, [self.group_channels], axis=-1)
        channels = ops.reshape(channels, (batch, length, groups * self.group_channels))
        heads = self.linear_num_value_heads, self.linear_value_head_dim
        gate = ops.reshape(gate, (batch, length, *heads))
        return channels, gate

    def _heads(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, T, C)` -> unit queries and keys `(B, T, G, K)` and values `(B, T, H, V)`."""
        batch, length = ops.shape(channels)[:2]
        key_dim = self.linear_key_head_dim
        mixed = ops.reshape(
            channels, (batch, length, self.linear_num_key_heads, self.group_channels)
        )
        query, key, value = ops.split(mixed, [key_dim, 2 * key_dim], axis=-1)
        heads = self.linear_num_value_heads, self.linear_value_head_dim
        value = ops.reshape(value, (batch, length, *heads))
        return _l2_normalize(query), _l2_normalize(key), value

    def _gates(self, ba: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, T, G, [b of its heads | a of its heads])` -> beta and g, `(B, T, H)` float32."""
        batch, length = ops.shape(ba)[:2]
        shape = (batch, length, self.linear_num_value_heads)
        b, a = ops.split(ops.cast(ba, "float32"), 2, axis=-1)
        b, a = ops.reshape(b, shape), ops.reshape(a, shape)
        rate = ops.exp(ops.cast(self.A_log, "float32"))
        return ops.sigmoid(b), -rate * ops.softplus(a + ops.cast(self.dt_bias, "float32"))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        context = MixerContext(*args, **kwargs)
        check_context(context, needs_lengths=False)
        output = spec_like(x, self.compute_dtype)
        if context.cache is None:
            return output
        cache = DeltaNetCache(*map(spec_like, context.cache))
        return output, self._update_spec(x, cache) if context.replayable else cache

    def _update_spec(self, x: Any, cache: DeltaNetCache) -> DeltaNetUpdate:
        (batch, length, _), (_, before, channels) = x.shape, cache.conv.shape
        groups, repeats = self.linear_num_key_heads, self.repeats
        # How far the op fills up the tokens is its own affair.
        by_group, by_head = (batch, groups, 1, None), (batch, groups, repeats, None)
        record = Replay(
            keras.KerasTensor((*by_group, self.linear_key_head_dim), "float32"),
            keras.KerasTensor((*by_head, self.linear_value_head_dim), "float32"),
            keras.KerasTensor(by_head, "float32"),
        )
        longer = None if length is None else before + length
        conv = keras.KerasTensor((batch, longer, channels), self.compute_dtype)
        return DeltaNetUpdate(conv, record)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_value_head_dim": self.linear_value_head_dim,
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
        }


def _l2_normalize(x: Tensor) -> Tensor:
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + L2_EPSILON)
