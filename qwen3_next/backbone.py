"""The trunk: token ids in, hidden states out."""

from typing import NamedTuple

import keras
from keras import ops

from qwen3_next.inputs import unpack
from qwen3_next.layers import (
    DecoderLayer,
    GatedAttention,
    GatedDeltaNet,
    SparseMoE,
    SwiGLU,
    load_balancing_loss,
)
from qwen3_next.layers.initializers import Normal
from qwen3_next.layers.norms import make_norm
from qwen3_next.layers.ops.sequence import valid_lengths
from qwen3_next.state import State
from qwen3_next.task import ConfiguredModel


class BackboneOutput(NamedTuple):
    """What a pass through the trunk gives.

    `hidden` `(B, T, D)` after the final norm and `before_norm` before it; `state` or `None`;
    `aux_loss`, the load-balancing
    loss before its coefficient, and `expert_load` `(mixture layers, E)`, the load of every expert
    relative to an even one; both `None` for a dense model.
    """

    hidden: object
    state: object
    aux_loss: object
    expert_load: object
    before_norm: object = None


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3NextBackbone(ConfiguredModel):
    """Embedding, decoder layers and final norm of a Qwen3-Next model.

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        dtype: Dtype policy of all layers.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"`
            (true at real tokens, anywhere in the row) and `"segment_ids"` (packed sequences).
        state: `State` to continue from, or `None`. A state holds one sequence a row.
        full_output: Whether to return a `BackboneOutput` without a state, too.
        with_replay: Whether the pass may be taken back. The state that is returned is then one for
            `commit`. Real tokens must stand at the front of a row.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Hidden states `(B, T, D)`; with a state or `full_output` a `BackboneOutput`.
    """

    def __init__(
        self, config=None, *, gradient_checkpointing=False, name=None, dtype=None, **fields
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        self.refuse_mtp()
        self.gradient_checkpointing = gradient_checkpointing
        config, policy = self.config, self.dtype_policy
        self.embed_tokens = keras.layers.Embedding(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=Normal(config.initializer_range),
            name="embed_tokens",
            dtype=policy,
        )
        self.decoder_layers = [
            make_decoder_layer(
                config,
                config.layer_types[i],
                config.is_mixture(i),
                gradient_checkpointing,
                name=f"layers_{i}",
                dtype=policy,
            )
            for i in range(config.num_layers)
        ]
        self.norm = make_norm(config.normalization_type, config.rms_norm_eps, "norm", policy)
        self.build()

    def build(self, input_shape=None):
        if self.built:
            return
        shape = (None, None, self.config.hidden_size)
        self.embed_tokens.build((None, None))
        for layer in (*self.decoder_layers, self.norm):
            layer.build(shape)
        self.built = True

    def init_state(self, batch_size, max_length):
        """An empty state for sequences of up to `max_length` tokens."""
        if not 1 <= max_length <= self.config.max_position_embeddings:
            raise ValueError(
                "`max_length` must be between 1 and `max_position_embeddings`="
                f"{self.config.max_position_embeddings}. Received: {max_length=}"
            )
        slots = tuple((layer.init_slot(batch_size, max_length),) for layer in self.decoder_layers)
        return State(ops.zeros((batch_size,), "int32"), slots)

    def call(self, inputs, state=None, full_output=False, with_replay=False, training=None):
        token_ids, padding_mask, segment_ids = unpack(inputs)
        length = token_ids.shape[1]
        if length is not None and length > self.config.max_position_embeddings:
            raise ValueError(
                "Sequences must have at most `max_position_embeddings`="
                f"{self.config.max_position_embeddings} tokens. Received: {length} tokens"
            )
        if state is not None and segment_ids is not None:
            raise ValueError(
                "A state holds one sequence a row: `segment_ids` must be None with a state. "
                f"Received: segment_ids={segment_ids}"
            )
        hidden = self.embed_tokens(token_ids)
        slots, routings = [], []
        for index, layer in enumerate(self.decoder_layers):
            hidden, slot, routing = layer(
                hidden,
                padding_mask=padding_mask,
                segment_ids=segment_ids,
                slot=None if state is None else state.slots[index][0],
                lengths=None if state is None else state.lengths,
                with_replay=with_replay,
                training=training,
            )
            slots.append((slot,))
            if routing is not None:
                routings.append(routing)
        before_norm, hidden = hidden, self.norm(hidden)
        if state is None and not full_output:
            return hidden
        if state is not None:
            new = length if padding_mask is None else valid_lengths(padding_mask)
            state = State(state.lengths + new, tuple(slots))
        return BackboneOutput(hidden, state, *_balance(routings), before_norm)

    def commit(self, state, record, counts):
        """The state after the first tokens of a pass that may be taken back.

        Args:
            state: `State` the pass began with.
            record: What it returned as its state.
            counts: `(B,)` int32, tokens of every row that stay.

        Returns:
            `State`.
        """
        layers = zip(self.decoder_layers, state.slots, record.slots)
        slots = tuple((layer.commit(old[0], new[0], counts),) for layer, old, new in layers)
        return State(state.lengths + counts, slots)

    def output_shape_of(self, batch, length):
        return (batch, length, self.config.hidden_size)

    def get_config(self):
        return {**super().get_config(), "gradient_checkpointing": self.gradient_checkpointing}


def _balance(routings):
    if not routings:
        return None, None
    loads = ops.stack([routing.load for routing in routings])
    even = ops.maximum(ops.mean(loads, axis=-1, keepdims=True), 1e-9)
    return load_balancing_loss(routings), loads / even


def make_decoder_layer(
    config, layer_type, is_mixture, gradient_checkpointing=False, name=None, dtype=None
):
    """A `DecoderLayer` of the given kind with the dimensions of a configuration."""
    return DecoderLayer(
        _mixer(config, layer_type, dtype),
        _mlp(config, is_mixture, dtype),
        normalization_type=config.normalization_type,
        rms_norm_eps=config.rms_norm_eps,
        dropout=config.dropout,
        gradient_checkpointing=gradient_checkpointing,
        name=name,
        dtype=dtype,
    )


def _mixer(config, layer_type, policy):
    if layer_type == "linear_attention":
        return GatedDeltaNet(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            linear_conv_kernel_dim=config.linear_conv_kernel_dim,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            name="linear_attn",
            dtype=policy,
        )
    return GatedAttention(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        output_gate=config.attention_type == "gated_attention",
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        normalization_type=config.normalization_type,
        rms_norm_eps=config.rms_norm_eps,
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
        name="self_attn",
        dtype=policy,
    )


def _mlp(config, is_mixture, policy):
    if not is_mixture:
        return SwiGLU(
            config.intermediate_size,
            config.ffn_type,
            config.initializer_range,
            name="mlp",
            dtype=policy,
        )
    return SparseMoE(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        ffn_type=config.ffn_type,
        initializer_range=config.initializer_range,
        name="mlp",
        dtype=policy,
    )
