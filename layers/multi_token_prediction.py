"""One step of multi-token prediction."""

from typing import NamedTuple

import keras
from keras import ops

from .decoder_layer import DecoderLayer
from .initializers import Normal
from .norms import make_norm


class MTPOutput(NamedTuple):
    """`hidden` `(B, T, D)`, which the next step and the head read; `cache` or `None`."""

    hidden: object
    cache: object


@keras.saving.register_keras_serializable(package="qwen3_next")
class MultiTokenPrediction(keras.layers.Layer):
    """Turns what is known at a token, and the next token, into what is known one token later.

        x_i = W [norm_e(embedding_i); norm_h(hidden_i)]      the embedding stands first
        y_i = norm(body(x_i))

    `hidden_i` is the backbone's output at token i, or this layer's own output of the step before, and
    `embedding_i` that of the token that follows. The language-model head makes of y_i the token
    after that one.

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
        cache: `AttentionCache` of the body to read and extend, or `None`.
        lengths: `(B,)` int32, pairs already in the cache; required with a cache.
        training: Whether to apply dropout and checkpointing.

    Returns:
        `MTPOutput(hidden, cache)`.

    Reference: DeepSeek-V3, arXiv 2412.19437, section 2.2, in the form of the published Qwen3-Next.
    """

    def __init__(
        self,
        body=None,
        normalization_type="zero_centered_rms_norm",
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.normalization_type = normalization_type
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.is_attention = isinstance(body, DecoderLayer)
        self.has_body = body is not None
        if self.has_body:
            # By the published name where there is one.
            setattr(self, "layers_0" if self.is_attention else "mlp", body)

    @property
    def body(self):
        if not self.has_body:
            return None
        return self.layers_0 if self.is_attention else self.mlp

    def build(self, input_shape, hidden_shape=None):
        width, policy = input_shape[-1], self.dtype_policy

        def norm(name):
            layer = make_norm(self.normalization_type, self.rms_norm_eps, name, policy)
            layer.build((None, None, width))
            return layer

        self.fc = keras.layers.Dense(
            width,
            use_bias=False,
            kernel_initializer=Normal(self.initializer_range),
            name="fc",
            dtype=policy,
        )
        self.fc.build((None, None, 2 * width))
        self.pre_fc_norm_embedding = norm("pre_fc_norm_embedding")
        self.pre_fc_norm_hidden = norm("pre_fc_norm_hidden")
        self.norm = norm("norm")
        if self.has_body and not self.body.built:
            self.body.build((None, None, width))
        if self.has_body and not self.is_attention:
            self.mlp_norm = norm("mlp_norm")

    def init_cache(self, batch_size, max_length):
        """An empty cache of the body for `max_length` pairs a row, `None` without attention."""
        return self.body.init_cache(batch_size, max_length) if self.is_attention else None

    def call(
        self,
        embedding,
        hidden,
        padding_mask=None,
        segment_ids=None,
        cache=None,
        lengths=None,
        training=None,
    ):
        parts = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(ops.concatenate(parts, axis=-1))
        if self.is_attention:
            x, cache, _ = self.body(
                x,
                padding_mask=padding_mask,
                segment_ids=segment_ids,
                cache=cache,
                lengths=None if cache is None else lengths,
                training=training,
            )
        elif self.has_body:
            x = x + self.body(self.mlp_norm(x))
        return MTPOutput(self.norm(x), cache)

    def compute_output_spec(self, embedding, hidden, **others):
        return MTPOutput(keras.KerasTensor(hidden.shape, dtype=self.compute_dtype), None)

    def get_config(self):
        body = None if self.body is None else keras.saving.serialize_keras_object(self.body)
        return {
            **super().get_config(),
            "body": body,
            "normalization_type": self.normalization_type,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
        }

    @classmethod
    def from_config(cls, config):
        body = config["body"]
        if body is not None:
            body = keras.saving.deserialize_keras_object(body)
        return cls(**{**config, "body": body})
