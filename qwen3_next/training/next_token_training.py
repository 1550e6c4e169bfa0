"""The train and test step of a language model.

Within a step the model returns hidden states, so that the loss can be fused with the head;
everywhere else it returns logits. The loss and all metrics are computed in
`compute_loss`, where the weights of the step are at hand; Keras keeps the metrics' updates.
"""

from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.layers.ops import cross_entropy, linear_cross_entropy
from qwen3_next.layers.ops.backend.replicas import share_of_replica, sum_over_replicas
from qwen3_next.layers.ops.cross_entropy import IGNORE
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.decisions import reads_prompts
from qwen3_next.models.inputs import step_labels, unpack
from qwen3_next.training.counted_logits import counted_logits
from qwen3_next.training.loss_tracker import LossTracker, loss_over
from qwen3_next.training.losses import label_weight, masked_mean, weight_of_loss, weight_on_replica
from qwen3_next.training.own_losses import note_step, own_losses
from qwen3_next.training.replicas_of_step import MEANS
from qwen3_next.training.step_inputs import StepOutput, with_step_inputs
from qwen3_next.training.thinking_metrics import make_thinking_metrics


class NextTokenTraining(ConfiguredModel):
    """The part of a language model that `fit` and `evaluate` use.

    The model has a `backbone`, a head (`logits`, `head_kernel`) and perhaps MTP modules, and
    returns a `StepOutput` for `StepInputs`.
    """

    _compile_metrics: Any

    def add_training_metrics(self) -> None:
        """Creates the metrics that a step updates by itself; called by the constructor."""
        mtp = self.config.mtp
        steps = range(1, mtp.num_predict_tokens + 1) if mtp is not None else ()
        self.mtp_metrics = [
            keras.metrics.Mean(name=f"mtp_{what}_k{k}")
            for what in ("loss", "accuracy")
            for k in steps
        ]
        self.thinking_metrics = make_thinking_metrics(self.config)
        self.expert_load_max: Any = None
        self.expert_load_unused: Any = None
        if self.config.moe_layers:
            self.expert_load_max = keras.metrics.Mean(name="expert_load_max")
            self.expert_load_unused = keras.metrics.Mean(name="expert_load_unused")

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: Any = "sparse_categorical_crossentropy",
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.compile`; the default loss is the cross-entropy from logits.

        Metrics leave out ignored labels and padding, a metric of one's own if it is weighted or
        reads Keras' mask of the logits. Where the loss is a mean, that of `fit` and `evaluate` is
        over all labels that count, whichever rows share a batch.
        """
        super().compile(
            optimizer, loss, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs
        )
        self._is_token_loss = (
            type(self.loss) is keras.losses.SparseCategoricalCrossentropy
            and self.loss.reduction in MEANS
            and self.loss.ignore_class in (None, IGNORE)
            and kwargs.get("loss_weights") is None
        )
        # Keras keeps the metrics of before where none are named; an empty list says that there are
        # none, and is never built by a step that makes no logits for it.
        given = [m for m in (metrics, weighted_metrics) if m is not None]
        if given and not any(given):
            self._compile_metrics = None
        # Past Keras, which would list it twice: as the tracker and among the metrics of the model.
        object.__setattr__(self, "_loss_tracker", LossTracker())

    def train_step(self, *args):
        with loss_over(self._weight_of_loss(args[-1])):
            return super().train_step(*with_step_inputs(args, reads_prompts(self.config)))

    def test_step(self, *args):
        with loss_over(self._weight_of_loss(args[-1])):
            return super().test_step(*with_step_inputs(args, reads_prompts(self.config)))

    def _weight_of_loss(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return weight_of_loss(self.loss, self.step_labels(x, y), sample_weight)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, StepOutput):
            labels = self.step_labels(x, y)
            loss = self._loss_of_logits(x, labels, y_pred, sample_weight, training)
            if self._is_token_loss:
                loss = self.mean_loss(labels, sample_weight, logits=y_pred)
                loss = sum((ops.sum(extra) for extra in self.losses), start=loss)
            return share_of_replica(loss)
        labels = self.step_labels(x.inputs, y)
        logits = None
        if self._compile_metrics is not None or not self._is_token_loss:
            logits = self.logits(y_pred.hidden)
        if self._is_token_loss:
            loss = self.mean_loss(labels, sample_weight, logits=logits, hidden=y_pred.hidden)
            loss = sum((ops.sum(extra) for extra in self.losses), start=loss)
        else:
            loss = self._loss_of_logits(x, labels, logits, sample_weight, training)
        own = own_losses(self, x.inputs, labels, y_pred, sample_weight, training)
        note_step(self, labels, y_pred, own, training)
        loss = loss + own.loss
        if logits is not None:
            self._update_metrics(x.inputs, labels, logits, sample_weight)
        return share_of_replica(loss)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if not isinstance(y_pred, StepOutput):  # Keras builds the metrics with logits
            self._update_metrics(x, self.step_labels(x, y), y_pred, sample_weight)
        return self.get_metrics_result()

    def step_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that a step updates by itself."""
        load = (self.expert_load_max, self.expert_load_unused)
        found = (*self.mtp_metrics, *self.thinking_metrics, *load)
        return [metric for metric in found if metric is not None]

    def mean_loss(
        self,
        labels: Annotated[Tensor, "B T"],
        sample_weight: Tensor | None = None,
        *,
        logits: Annotated[Tensor, "B T V"] | None = None,
        hidden: Annotated[Tensor, "B T D"] = None,
    ) -> Annotated[Tensor, ""]:
        """Mean cross-entropy from the logits, or without them from the hidden states."""
        if logits is not None:
            return masked_mean(cross_entropy(logits, labels), labels, sample_weight)
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        losses = linear_cross_entropy(flat, self.head_kernel(), ops.reshape(labels, (-1,)))
        return masked_mean(ops.reshape(losses, ops.shape(labels)), labels, sample_weight)

    def _loss_of_logits(self, x, labels, logits, sample_weight, training):
        """The compiled loss as Keras computes it, of the whole batch.

        Where the loss is fused, Keras asks for it once and symbolically, before the first step: a
        compiled loss that was never built would make it trace the model again at every call.
        """
        weight = weight_on_replica(self.loss, labels, sample_weight)
        logits = counted_logits(logits, labels != IGNORE)
        loss = super().compute_loss(x, ops.maximum(labels, 0), logits, weight, training)
        return sum_over_replicas(loss)

    def _update_metrics(self, inputs, labels, logits, sample_weight):
        weight = label_weight(labels, sample_weight)
        logits = counted_logits(logits, labels != IGNORE)
        super().compute_metrics(inputs, ops.maximum(labels, 0), logits, sample_weight=weight)

    def step_labels(self, x: Any, y: Any) -> Annotated[Tensor, "B T"]:
        """The labels of a step that line up with the logits, -100 where ignored."""
        return step_labels(unpack(x), y)
