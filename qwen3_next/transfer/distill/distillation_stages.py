"""What a student learns of its teacher, stage by stage.

    Alignment    every converted mixer does to the teacher's hidden states what the teacher's does
    Logits       the whole student predicts what the teacher predicts

A stage says which variables learn, what a step computes with student and teacher, and the losses.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from qwen3_next.layers.ops import linear_kl_divergence, linear_top_kl_divergence
from qwen3_next.layers.ops.cross_entropy import IGNORE
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.inputs import unpack
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.training.losses import fused_losses, masked_mean, per_token
from qwen3_next.training.own_losses import note_step, own_losses
from qwen3_next.training.step_inputs import StepInputs, StepOutput
from qwen3_next.transfer.distill.frozen_teacher import FrozenTeacher
from qwen3_next.transfer.distill.layer_streams import layer_outputs, mixer_output
from qwen3_next.transfer.distill.stored_batches import TopLogits, split_stored

QUIET = 1e-8  # mean square below which a hidden state counts as that small


class StepLossesOfStage(NamedTuple):
    """The losses of a step.

    Attributes:
        loss: `()`, what a step lowers, without what layers add by `add_loss`.
        parts: Means over the tokens that count, by the names they are logged under.
        count: `()`, the number of these tokens.
        real: `()`, the number of real tokens, over which a `layer_loss` is a mean.
        own: `OwnLosses` of the student, or `None` where it does not run as a whole.
        labels: `(B, T)` that line up with the logits, or `None` where there are none.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    count: Tensor
    real: Tensor
    own: Any = None
    labels: Tensor | None = None


class Aligned(NamedTuple):
    """What the mixers of the aligned layers add, `(B, T, D)` each."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]


class Distilled(NamedTuple):
    """What student and teacher give in a step.

    Attributes:
        student: `StepOutput`.
        student_layers: `(B, T, D)` of every layer, or `None` where layers are not compared.
        teacher_hidden: `(B, T, E)`, or `None` where the teacher's logits are stored.
        teacher_layers: `(B, T, D)` of every layer, or `None`.
        stored: `TopLogits`, or `None` where the teacher runs.
    """

    student: StepOutput
    student_layers: tuple[Tensor, ...] | None
    teacher_hidden: Tensor | None
    teacher_layers: tuple[Tensor, ...] | None
    stored: TopLogits | None


@dataclass(frozen=True)
class Alignment:
    """Mixers, each on what its layer reads in the teacher.

        loss = mean over layers of mean over real tokens of ||t - s||^2 / ||t||^2

    Attributes:
        layers: Numbers of the layers whose mixers learn.
        train_input_norms: Whether the norms before them learn, too.
    """

    layers: tuple[int, ...]
    train_input_norms: bool

    def part_names(self) -> list[str]:
        return [f"layer_{number}_loss" for number in self.layers]

    def learning(self, student: Qwen3Next) -> list[keras.Variable]:
        found = []
        for number in self.layers:
            layer = student.backbone.decoder_layers[number]
            norms = [layer.input_layernorm] if self.train_input_norms else []
            found += [v for part in (*norms, layer.mixer) for v in part.trainable_variables]
        return found

    def output(
        self, student: Qwen3Next, teacher: FrozenTeacher | None, step: StepInputs, training: bool
    ) -> Aligned:
        teacher = _needed(teacher)
        inputs = unpack(step.inputs)
        taught = teacher.streams(inputs)  # of all layers, in one pass
        streams = [taught[number] for number in self.layers]
        layers = [student.backbone.decoder_layers[number] for number in self.layers]
        mixed = [
            mixer_output(layer, stream.hidden, inputs, training)
            for layer, stream in zip(layers, streams, strict=True)
        ]
        return Aligned(tuple(mixed), tuple(stream.mixed for stream in streams))

    def losses(
        self,
        student: Qwen3Next,
        teacher: FrozenTeacher | None,
        step: StepInputs,
        output: Aligned,
        sample_weight: Tensor | None,
        training: bool,
    ) -> StepLossesOfStage:
        real = _real_tokens(step.inputs)
        values = [
            _mean_over_tokens(relative_error(s, t), real, sample_weight)
            for s, t in zip(output.student, output.teacher, strict=True)
        ]
        parts = dict(zip(self.part_names(), values, strict=True))
        count = ops.sum(ops.cast(real, "float32"))
        return StepLossesOfStage(sum(values[1:], values[0]) / len(values), parts, count, count)

    def note(self, student: Qwen3Next, output: Aligned, losses: Any, training: bool) -> None:
        """Nothing: the student does not run as a whole."""


@dataclass(frozen=True)
class Logits:
    """The student as a whole, on what the teacher predicts and on the labels.

        loss = alpha t^2 KL(teacher || student) + (1 - alpha) cross-entropy
             + layer_weight mean over layers of mean over real tokens of ||t - s||^2 / ||t||^2
             + what the student adds in its own training

    Attributes:
        temperature: t.
        alpha: Share of the teacher.
        layer_weight: Weight of the hidden states that layers return.
    """

    temperature: float
    alpha: float
    layer_weight: float

    def part_names(self) -> list[str]:
        return ["kd_loss", "task_loss", *(["layer_loss"] if self.layer_weight else []), "accuracy"]

    def learning(self, student: Qwen3Next) -> list[keras.Variable]:
        return student.trainable_variables

    def output(
        self, student: Qwen3Next, teacher: FrozenTeacher | None, step: StepInputs, training: bool
    ) -> Distilled:
        given, stored = split_stored(step.inputs)
        step = StepInputs(given, step.labels)
        if stored is not None:
            self._check_stored(teacher)
            return Distilled(student(step, training=training), None, None, None, stored)
        teacher = _needed(teacher)
        if not self.layer_weight:
            hidden = teacher.hidden(step)
            return Distilled(student(step, training=training), None, hidden, None, None)
        found, taught = layer_outputs(student, given, training), teacher.outputs(given)
        backbone = found.backbone
        output = StepOutput(
            hidden=backbone.hidden,
            mtp_input=student.mtp_input(backbone) if student.mtp_modules else None,
            routings=backbone.routings,
            thinking=None,
        )
        return Distilled(output, found.layers, taught.backbone.hidden, taught.layers, None)

    def losses(
        self,
        student: Qwen3Next,
        teacher: FrozenTeacher | None,
        step: StepInputs,
        output: Distilled,
        sample_weight: Tensor | None,
        training: bool,
    ) -> StepLossesOfStage:
        given, _ = split_stored(step.inputs)
        labels = student.step_labels(given, step.labels)
        task, hits = fused_losses(output.student.hidden, student.head_kernel(), labels)
        divergence = self._divergence(student, teacher, output, labels)
        parts = {
            "kd_loss": masked_mean(divergence, labels, sample_weight),
            "task_loss": masked_mean(task, labels, sample_weight),
            "accuracy": masked_mean(hits, labels),
        }
        loss = self.alpha * parts["kd_loss"] + (1 - self.alpha) * parts["task_loss"]
        if self.layer_weight:
            parts["layer_loss"] = self._layer_loss(given, output, sample_weight)
            loss = loss + self.layer_weight * parts["layer_loss"]
        own = own_losses(student, given, labels, output.student, sample_weight, training)
        count = ops.sum(ops.cast(labels != IGNORE, "float32"))
        real = ops.sum(ops.cast(_real_tokens(given), "float32"))
        return StepLossesOfStage(loss + own.loss, parts, count, real, own, labels)

    def note(
        self, student: Qwen3Next, output: Distilled, losses: StepLossesOfStage, training: bool
    ) -> None:
        """Updates the student's own metrics and counters."""
        note_step(student, losses.labels, output.student, losses.own, training)

    def _divergence(self, student, teacher, output, labels):
        hidden = output.student.hidden
        rows = ops.reshape(hidden, (-1, hidden.shape[-1]))
        counts = ops.reshape(labels != IGNORE, (-1,))
        kernel = student.head_kernel()
        if output.stored is not None:
            ids, log_probs = (ops.reshape(x, (-1, ops.shape(x)[-1])) for x in output.stored)
            found = linear_top_kl_divergence(rows, kernel, ids, log_probs, self.temperature, counts)
        else:
            taught = output.teacher_hidden
            taught = ops.reshape(taught, (-1, taught.shape[-1]))
            found = linear_kl_divergence(
                rows, kernel, taught, teacher.head_kernel(), self.temperature, counts
            )
        return ops.reshape(found, ops.shape(labels))

    def _layer_loss(self, given, output, sample_weight):
        real = _real_tokens(given)
        pairs = zip(output.student_layers, output.teacher_layers, strict=True)
        values = [_mean_over_tokens(relative_error(s, t), real, sample_weight) for s, t in pairs]
        return sum(values[1:], values[0]) / len(values)

    def _check_stored(self, teacher):
        if teacher is not None or self.layer_weight:
            raise ValueError(
                "Stored logits stand for a teacher, and have no hidden states: give `teacher=None` "
                f"and `layer_weight=0`. Received: teacher={teacher and teacher.model}, "
                f"layer_weight={self.layer_weight}"
            )


def relative_error(
    student: Annotated[Tensor, "B T D"], teacher: Annotated[Tensor, "B T D"]
) -> Annotated[Tensor, "B T"]:
    """`||t - s||^2 / ||t||^2` of every token in float32: 1 for a student that says nothing.

    By token and not over a batch, so that the mean does not depend on how tokens are batched, and
    few tokens of a large norm do not decide.
    """
    student, teacher = ops.cast(student, "float32"), ops.cast(teacher, "float32")
    size = ops.maximum(ops.mean(ops.square(teacher), axis=-1), QUIET)
    return ops.mean(ops.square(teacher - student), axis=-1) / size


def _needed(teacher):
    if teacher is None:
        raise ValueError(
            "A step needs a `teacher`, by `set_teacher`, or batches of `StoredLogits`. "
            "Received: teacher=None"
        )
    return teacher


def _real_tokens(inputs):
    inputs = unpack(inputs)
    if inputs.padding_mask is None:
        return ops.ones_like(inputs.token_ids, "bool")
    return inputs.padding_mask


def _mean_over_tokens(values, real, sample_weight):
    weight = ops.cast(real, "float32")
    count = ops.maximum(ops.sum(weight), 1.0)
    if sample_weight is not None:
        weight = weight * per_token(sample_weight)
    return ops.sum(values * weight) / count
