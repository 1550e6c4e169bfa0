"""A classification head on the backbone."""

from typing import Any, NamedTuple

import keras
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, integer, require
from qwen3_next.layers import Routing, Thinking
from qwen3_next.layers.ops.backend.replicas import share_of_replica, sum_over_replicas
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.assembly import check_head, make_head
from qwen3_next.models.backbone import Qwen3NextBackbone, balance
from qwen3_next.models.decisions import with_prompts
from qwen3_next.models.inputs import check_labels, last_hidden, unpack
from qwen3_next.tasks.losses_from_logits import compares_elements, takes_one_hot
from qwen3_next.tasks.task import Task
from qwen3_next.training.replicas_of_step import weight_of_rows
from qwen3_next.training.step_inputs import StepInputs, with_step_inputs
from qwen3_next.training.thinking_metrics import (
    make_thinking_metrics,
    thinking_loss,
    update_thinking_metrics,
)


class ClassifierStepOutput(NamedTuple):
    """What a classifier returns within a train or test step.

    Attributes:
        logits: `(B, num_labels)`.
        thinking: `Thinking`, or `None` without a think loop.
        routings: `Routing` of every MoE layer, `()` for a dense model.
    """

    logits: Tensor
    thinking: Thinking | None
    routings: tuple[Routing, ...]


@keras.saving.register_keras_serializable(package="qwen3_next")
class Qwen3NextClassifier(Task):
    """Classifies sequences by the hidden state of their last real token.

        logits = score(dropout(hidden[last real token]))

    The last token is the only one that has seen the whole sequence; which one it is comes from
    the padding mask, on whichever side the padding stands. With `num_labels=1` and
    `compile(loss="mse")` it regresses; with `compile(loss="binary_crossentropy")` a row may have
    several labels, `y` is `(B, num_labels)` of 0 and 1 then.

    Args:
        config: `Qwen3NextConfig`, or its fields as keyword arguments.
        num_labels: Number of classes.
        pad_token_id: The token that `export_to_transformers` names as padding. This class looks at
            the padding mask alone, but its counterpart in transformers takes the last token with
            another id for the end of a row. Presets keep it; 0 is what `pad` writes.
        gradient_checkpointing: Whether training recomputes the inside of every layer in the
            backward pass instead of keeping it.
        backbone: `Qwen3NextBackbone` to build on and to share, or `None` for a new one. Its
            configuration must be that of the model.
        score: Head to share, as another model's `score`, or `None` for a new one.
        dtype: Dtype policy of all layers.

    Call arguments:
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and `"padding_mask"`.
        think_iterations: Iterations of the think loop, `None` for those of the configuration.
        training: Whether to apply dropout and checkpointing.

    Returns:
        Logits `(B, num_labels)`, float32 under every dtype policy.

    Raises:
        ValueError: a configuration or an option out of range, or packed inputs.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3NextClassifier

    model = Qwen3NextClassifier.from_variant(
        "tiny", num_labels=3, vocab_size=64, hidden_size=32, num_layers=1
    )
    model.compile("adamw", metrics=["accuracy"])
    model.fit(np.ones((2, 8), "int32"), np.array([0, 2]), verbose=0)
    assert model.predict(np.ones((2, 8), "int32"), verbose=0).shape == (2, 3)
    ```
    """

    labels_are_indices = False

    def __init__(
        self,
        config: Qwen3NextConfig | None = None,
        *,
        num_labels: int,
        pad_token_id: int = 0,
        gradient_checkpointing: bool = False,
        backbone: Qwen3NextBackbone | None = None,
        score: keras.layers.Dense | None = None,
        name: str | None = None,
        dtype: Any = None,
        **fields: Any,
    ):
        super().__init__(config, name=name, dtype=dtype, **fields)
        self.refuse_mtp()
        require(integer(1), "num_labels", num_labels)
        require(integer(0, self.config.vocab_size - 1), "pad_token_id", pad_token_id)
        require(BOOLEAN, "gradient_checkpointing", gradient_checkpointing)
        self.num_labels = num_labels
        self.pad_token_id = pad_token_id
        self.gradient_checkpointing = gradient_checkpointing
        if backbone is None:
            backbone = Qwen3NextBackbone(
                self.config,
                gradient_checkpointing=gradient_checkpointing,
                name="model",
                dtype=self.dtype_policy,
            )
        elif getattr(backbone, "config", None) != self.config:
            raise ValueError(
                "`backbone` must have the configuration of the model. "
                f"Received: backbone={backbone}, config={self.config}"
            )
        self.backbone = backbone
        self.pooled_dropout = keras.layers.Dropout(self.config.dropout, dtype=self.dtype_policy)
        self.pooled_dropout.build((None, self.config.hidden_size))
        if score is None:
            score = make_head(self.config, num_labels, "score", "float32")
        check_head("score", score, (self.config.hidden_size, num_labels))
        self.score = score
        self.thinking_metrics = make_thinking_metrics(self.config)
        self.built = True

    @staticmethod
    def constructor_options() -> tuple[str, ...]:
        return ("gradient_checkpointing", "num_labels", "pad_token_id")

    def call(self, inputs, think_iterations=None, training=None):
        if isinstance(inputs, StepInputs):
            return self._classify(inputs.inputs, None, training)[0]
        found, aux_loss = self._classify(inputs, think_iterations, training)
        if training:
            for loss in self._extra_losses(aux_loss, found.thinking):
                self.add_loss(loss)
        return found.logits

    def _classify(self, inputs, think_iterations, training):
        """`ClassifierStepOutput`, and the load-balancing loss or `None`."""
        inputs = unpack(inputs)
        if inputs.segment_ids is not None:
            raise ValueError(
                "A classifier pools one sequence per row: `segment_ids` must be None. "
                f"Received: segment_ids={inputs.segment_ids}"
            )
        inputs = with_prompts(self.config, inputs, None)  # what is read has seen the whole row
        output = self.backbone(
            inputs.given(),
            full_output=True,
            think_iterations=self.iterations_of(think_iterations),
            training=training,
        )
        pooled = last_hidden(output.hidden, inputs.padding_mask)
        pooled = self.pooled_dropout(ops.cast(pooled, "float32"), training=training)
        found = ClassifierStepOutput(self.score(pooled), output.thinking, output.routings)
        return found, output.aux_loss

    def _extra_losses(self, aux_loss, thinking):
        """What is added to the compiled loss in training."""
        balancing = None if aux_loss is None else self.config.router_aux_loss_coef * aux_loss
        found = balancing, thinking_loss(self.config, thinking)
        return [loss for loss in found if loss is not None]

    def train_step(self, *args):
        return super().train_step(*with_step_inputs(args))

    def test_step(self, *args):
        return super().test_step(*with_step_inputs(args))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        extra = []
        if isinstance(y_pred, ClassifierStepOutput):
            update_thinking_metrics(self.thinking_metrics, y_pred.thinking)
            if training:
                self.backbone.update_expert_bias()
                aux_loss, _ = balance(self.config, sum_over_replicas(y_pred.routings))
                extra = self._extra_losses(aux_loss, y_pred.thinking)
            y_pred = y_pred.logits
        shape = getattr(sample_weight, "shape", ())
        if compares_elements(self.loss) and tuple(shape[1:]) not in ((), (1,)):
            raise ValueError(
                "`sample_weight` must have one weight per row, (rows,): the loss has one value per "
                f"row. Received: sample_weight.shape={tuple(shape)}, loss={self.loss}"
            )
        sample_weight = weight_of_rows(self.loss, y_pred, sample_weight)
        loss = sum_over_replicas(super().compute_loss(x, y, y_pred, sample_weight, training))
        return share_of_replica(sum(extra, start=loss))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if isinstance(y_pred, ClassifierStepOutput):
            y_pred = y_pred.logits
        return super().compute_metrics(x, y, y_pred, sample_weight)

    @property
    def has_one_label(self) -> bool:
        loss = getattr(self, "loss", None)
        return self.num_labels == 1 or takes_one_hot(loss) or not compares_elements(loss)

    def check_batch(self, x: Any, y: Any) -> None:
        super().check_batch(x, y)
        if y is None:
            raise ValueError("A classifier learns from labels, `y`. Received: y=None")
        shape = getattr(y, "shape", None)
        if shape is None or not compares_elements(getattr(self, "loss", None)):
            return
        columns = tuple(shape[1:])
        if columns != (self.num_labels,) and (self.num_labels > 1 or columns):
            raise ValueError(
                f"`y` must have shape (rows, num_labels={self.num_labels}), as the loss compares "
                f"each logit with a label. Received: y.shape={tuple(shape)}, loss={self.loss}"
            )

    def check_labels(self, labels: Any) -> None:
        """Raises `ValueError` for labels that are no class."""
        check_labels(labels, self.num_labels, ignored=False)

    def output_shape_of(self, batch: int | None, length: int | None) -> tuple:
        return (batch, self.num_labels)

    @property
    def output_dtype(self) -> str:
        return "float32"

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "num_labels": self.num_labels,
            "pad_token_id": self.pad_token_id,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
