"""A classification head on the backbone."""

import keras
from keras import ops

from qwen3_next.layers.initializers import Normal
from qwen3_next.models.backbone import Qwen3NextBackbone
from qwen3_next.models.inputs import last_hidden, unpack
from qwen3_next.tasks.task import Task


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3NextClassifier(Task):
    """Classifies sequences by the hidden state of their last real token.

        logits = score(dropout(hidden[last real token]))

    The last token is the only one that has seen the whole sequence; which one it is comes from
    the padding mask, on whichever side the padding stands. With `num_labels=1` and
    `compile(loss="mse")` it regresses.

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        num_labels: Number of classes.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        dtype: Dtype policy of all layers.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and `"padding_mask"`.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Logits `(B, num_labels)`, float32 under every dtype policy.
    """

    def __init__(
        self,
        config=None,
        *,
        num_labels,
        gradient_checkpointing=False,
        name=None,
        dtype=None,
        **fields,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        self.refuse_mtp()
        if not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(
                f"`num_labels` must be an integer of at least 1. Received: {num_labels=}"
            )
        self.num_labels = num_labels
        self.gradient_checkpointing = gradient_checkpointing
        self.backbone = Qwen3NextBackbone(
            self.config,
            gradient_checkpointing=gradient_checkpointing,
            name="model",
            dtype=self.dtype_policy,
        )
        self.pooled_dropout = keras.layers.Dropout(self.config.dropout, dtype=self.dtype_policy)
        self.score = keras.layers.Dense(
            num_labels,
            use_bias=False,
            kernel_initializer=Normal(self.config.initializer_range),
            name="score",
            dtype="float32",
        )
        self.score.build((None, self.config.hidden_size))
        self.built = True

    @staticmethod
    def constructor_options():
        return ("gradient_checkpointing", "num_labels")

    def call(self, inputs, training=None):
        inputs = unpack(inputs)
        if inputs.segment_ids is not None:
            raise ValueError(
                "A classifier pools one sequence a row: `segment_ids` must be None. "
                f"Received: segment_ids={inputs.segment_ids}"
            )
        fields = {key: value for key, value in inputs._asdict().items() if value is not None}
        output = self.backbone(fields, full_output=True, training=training)
        if training and output.aux_loss is not None:
            self.add_loss(self.config.router_aux_loss_coef * output.aux_loss)
        pooled = last_hidden(output.hidden, inputs.padding_mask)
        return self.score(self.pooled_dropout(ops.cast(pooled, "float32"), training=training))

    def output_shape_of(self, batch, length):
        return (batch, self.num_labels)

    @property
    def output_dtype(self):
        return "float32"

    def get_config(self):
        return {
            **super().get_config(),
            "num_labels": self.num_labels,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
