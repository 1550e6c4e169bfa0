"""One layer of the backbone: a token mixer and a feed-forward network, each with its residual."""

from typing import NamedTuple

import keras
from keras import ops

from .gated_attention import GatedAttention
from .norms import make_norm
from .sparse_moe import Routing, SparseMoE


class DecoderLayerOutput(NamedTuple):
    """`hidden` `(B, T, D)`; `cache` of the mixer or `None`; `routing` of the mixture or `None`."""

    hidden: object
    cache: object
    routing: object


@keras.saving.register_keras_serializable(package="qwen3_next")
class DecoderLayer(keras.layers.Layer):
    """A pre-norm decoder layer with two residuals.

        h = x + dropout(mixer(norm_1(x)))
        y = h + dropout(mlp(norm_2(h)))

    Args:
        mixer: Token mixer, a `GatedDeltaNet` or a `GatedAttention`.
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
        replayable: Whether the pass may be taken back: the cache that is returned is then one for
            `commit`, not for the next call.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `DecoderLayerOutput(hidden, cache, routing)`.
    """

    def __init__(
        self,
        mixer,
        mlp,
        normalization_type="zero_centered_rms_norm",
        rms_norm_eps=1e-6,
        dropout=0.0,
        gradient_checkpointing=False,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        # Weights go by the published names, which tell the two kinds of mixer apart.
        self.is_attention = isinstance(mixer, GatedAttention)
        setattr(self, "self_attn" if self.is_attention else "linear_attn", mixer)
        self.mlp = mlp
        self.is_moe = isinstance(mlp, SparseMoE)
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.input_layernorm = self._norm("input_layernorm")
        self.post_attention_layernorm = self._norm("post_attention_layernorm")
        self.residual_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    @property
    def mixer(self):
        return self.self_attn if self.is_attention else self.linear_attn

    def _norm(self, name):
        return make_norm(self.normalization_type, self.rms_norm_eps, name, self.dtype_policy)

    def build(self, input_shape):
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

    def init_cache(self, batch_size, max_length):
        return self.mixer.init_cache(batch_size, max_length)

    def commit(self, cache, record, counts):
        """The cache after the first `counts` `(B,)` tokens of a pass with replay."""
        return self.mixer.commit(cache, record, counts)

    def call(
        self,
        x,
        padding_mask=None,
        segment_ids=None,
        cache=None,
        lengths=None,
        replayable=False,
        training=None,
    ):
        x = ops.cast(x, self.compute_dtype)
        options = {"padding_mask": padding_mask, "segment_ids": segment_ids, "cache": cache}
        if self.is_attention:
            options |= {"lengths": lengths, "training": training}
            if training and self.mixer.attention_dropout:
                # Drawn here, because a rematerialised function must not assign the generator.
                options["dropout_seed"] = self.mixer.seed_generator.next()
        else:
            options["replayable"] = replayable

        def mix(x):
            return self.mixer(self.input_layernorm(x), **options)

        def feed_forward(x):
            x = self.post_attention_layernorm(x)
            if not self.is_moe:
                return self.mlp(x)
            output, routing = self.mlp(x, padding_mask=padding_mask, return_routing=True)
            return output, *routing

        if self.gradient_checkpointing and training:
            mix, feed_forward = keras.remat(mix), keras.remat(feed_forward)
        mixed = mix(x)
        if cache is not None:
            mixed, cache = mixed
        hidden = x + self.residual_dropout(mixed, training=training)
        fed, routing = feed_forward(hidden), None
        if self.is_moe:
            fed, *routing = fed
            routing = Routing(*routing)
        hidden = hidden + self.residual_dropout(fed, training=training)
        return DecoderLayerOutput(hidden, cache, routing)

    def get_config(self):
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
    def from_config(cls, config):
        deserialize = keras.saving.deserialize_keras_object
        mixer, mlp = deserialize(config["mixer"]), deserialize(config["mlp"])
        return cls(**{**config, "mixer": mixer, "mlp": mlp})
