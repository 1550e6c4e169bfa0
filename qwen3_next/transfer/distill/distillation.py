"""Teaching a student what its teacher knows: `fit` on the teacher's mixers, then on its logits."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import keras
from keras import ops

from qwen3_next.checkpoints.staging import replaced
from qwen3_next.config.validation import shown
from qwen3_next.layers.ops.backend.programs import one_replica
from qwen3_next.models.decisions import check_inputs
from qwen3_next.models.inputs import next_token_labels, unpack
from qwen3_next.models.strategies import require_no_strategy
from qwen3_next.models.values import require_values
from qwen3_next.tasks.checked_trainer import CheckedTrainer
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.training.step_inputs import StepInputs, with_step_inputs
from qwen3_next.training.thinking_metrics import names_of
from qwen3_next.transfer.distill.distillation_options import stage_of
from qwen3_next.transfer.distill.distillation_stages import Alignment, Logits
from qwen3_next.transfer.distill.frozen_teacher import (
    FrozenTeacher,
    require_language_model,
    require_pair,
    require_same_layers,
)
from qwen3_next.transfer.distill.stored_batches import (
    StoredLogitsDataset,
    check_settings,
    split_stored,
)


@keras.saving.register_keras_serializable(package="qwen3_next")
class DistillationTrainer(CheckedTrainer):
    """Trains a student on what a frozen teacher does, one stage after the other.

    `stage="alignment"`: every converted mixer reads what its layer reads in the teacher, and learns
    to add what the teacher's mixer adds. All layers learn at once, from one pass of the teacher;
    of the student nothing else runs or learns.

        loss = mean over layers, mean over real tokens of ||t - s||^2 / ||t||^2

    `stage="logits"`: the student as a whole learns what the teacher predicts, and the labels.

        loss = alpha t^2 KL(softmax(z_teacher / t) || softmax(z_student / t))
             + (1 - alpha) cross-entropy
             + layer_weight mean over layers, mean over real tokens of ||t - s||^2 / ||t||^2

    both means over the labels that are not -100, so that neither padding nor the length of rows nor
    the size of batches changes them. What the student adds in its own training (load balancing,
    multi-token prediction, thinking) is added here, too. The logits of a batch are never held
    whole, neither the student's nor the teacher's. The recipe's last stage, cross-entropy at a
    longer context, is the student's own `fit`.

    `fit`, `evaluate` and the others take what `Qwen3Next.fit` takes: token ids or a dict, and
    labels that line up with the logits, or none for the next tokens. Alignment has no use for
    labels and refuses them. They log `loss`, `kd_loss`, `task_loss` and `accuracy`, or `loss` and a
    `layer_3_loss` for every aligned layer; all are means over tokens of all batches. `predict`
    gives the student's logits.

    The teacher learns nothing, and is no part of what is saved: a `.keras` file of the trainer, as
    `ModelCheckpoint` writes it, holds the student, under `student`, and the state of the optimizer.
    `load_model` and `set_teacher` go on where it was saved.

    Args:
        teacher: `Qwen3Next` with the vocabulary of the student, or `None` to give it later by
            `set_teacher`, or to train on `StoredLogits`.
        student: `Qwen3Next` that learns.
        config: `CrossArchTransferConfig`, whose `distillation_temperature` and `distillation_alpha`
            stand for the two arguments below; with `use_distillation=False` alpha is 0.
        temperature: t, 2.0 by default; above 0.
        alpha: Share of the teacher, 0.5 by default; 0 to 1.
        layer_weight: Weight of the hidden states that layers return, 0 for none.
        stage: `"logits"` or `"alignment"`.
        layers: Numbers of the layers to align. By default those whose kind of mixer differs from
            the teacher's.
        train_input_norms: Whether alignment trains the norms before the mixers, too.

    Raises:
        ValueError: models that do not fit together, an argument out of range or of another stage;
            and from `fit` and the others, data that the student cannot learn from.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.distill.distillation import DistillationTrainer

    shape = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    teacher = Qwen3Next.from_variant("tiny", full_attention_interval=1, **shape)
    student = Qwen3Next.from_variant("tiny", full_attention_interval=2, **shape)
    token_ids = np.random.default_rng(0).integers(0, 64, (4, 8))
    for stage in ("alignment", "logits"):
        trainer = DistillationTrainer(teacher, student, stage=stage)
        trainer.compile(optimizer="adamw")
        trainer.fit(token_ids, batch_size=2, verbose=0)
    losses = trainer.compute_loss(token_ids)
    assert set(losses) == {"loss", "kd_loss", "task_loss"}
    ```

    Reference: Distilling the Knowledge in a Neural Network, arXiv 1503.02531; the stages are those
    of RADLADS, arXiv 2505.03005.
    """

    def __init__(
        self,
        teacher: Qwen3Next | None,
        student: Qwen3Next,
        config: Any = None,
        *,
        temperature: float | None = None,
        alpha: float | None = None,
        layer_weight: float = 0.0,
        stage: str = "logits",
        layers: Sequence[int] | None = None,
        train_input_norms: bool = False,
        **kwargs: Any,
    ) -> None:
        # Log-probabilities among the inputs stay float32 under any policy.
        super().__init__(autocast=False, **kwargs)
        require_no_strategy(type(self).__name__, student, teacher)
        require_language_model("student", student)
        if teacher is not None:
            require_pair(teacher, student)
        options: dict[str, Any] = {
            "temperature": temperature,
            "alpha": alpha,
            "layer_weight": layer_weight,
            "layers": layers,
            "train_input_norms": train_input_norms,
        }
        self._stage = stage_of(teacher, student, config, stage, options)
        self.stage = stage
        self.student = student
        self.teacher: FrozenTeacher | None = None
        self.means: list[keras.metrics.Mean] = [
            keras.metrics.Mean(name=n) for n in ("loss", *self._stage.part_names())
        ]
        self.built = True
        if teacher is not None:
            self.set_teacher(teacher)

    def set_teacher(self, teacher: Qwen3Next) -> None:
        """Gives the trainer its teacher, as after `load_model`; also another than before.

        Args:
            teacher: `Qwen3Next` with the vocabulary of the student.

        Raises:
            ValueError: a model that does not fit the student.
        """
        require_pair(teacher, self.student)
        if self._compares_layers():
            require_same_layers(teacher, self.student)
        self.teacher = FrozenTeacher(teacher)
        # What was compiled has the variables of another one for arguments.
        self.train_function = self.test_function = self.predict_function = None

    def _compares_layers(self):
        return isinstance(self._stage, Alignment) or self._stage.layer_weight > 0

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return self._stage.learning(self.student)

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self.trainable_variables

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        # With those of the teacher: on JAX whatever a compiled step is not given becomes a constant
        # of its program. Keras donates and returns them, so that there is no second copy.
        learning = {id(variable) for variable in self.trainable_variables}
        taught = [] if self.teacher is None else self.teacher.variables
        return [v for v in (*self.variables, *taught) if id(v) not in learning]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        # Without Keras' own mean of losses, which counts rows and not tokens.
        return [*self.means, *self._student_metrics()]

    def _student_metrics(self):
        return self.student.step_metrics() if isinstance(self._stage, Logits) else []

    def compile(self, optimizer: Any = "adamw", loss: Any = None, **options: Any) -> None:
        """As `keras.Model.compile`; the loss and the metrics are those of the stage."""
        given = {"loss": loss, **options}
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if given.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None: a stage has a loss and metrics of its own. "
                    f"Received: {name}={given[name]}"
                )
        super().compile(optimizer=optimizer, **options)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def call(self, inputs, training=None):
        if not isinstance(inputs, StepInputs):
            return self.student(split_stored(inputs)[0], training=training)
        return self._stage.output(self.student, self.teacher, inputs, bool(training))

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> keras.KerasTensor:
        return self.student.compute_output_spec(split_stored(inputs)[0])

    def train_step(self, *args):
        with one_replica():
            return super().train_step(*with_step_inputs(args, labels=True))

    def test_step(self, *args):
        return super().test_step(*with_step_inputs(args, labels=True))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
        labels: Any = None,
    ) -> Any:
        """The losses of a batch, for a training loop of one's own: `compute_loss(ids, labels)`.

        Keras' steps call it, too, with what the models returned.

        Args:
            x: Token ids `(B, T)` or a dict, as for `fit`.
            y: Unshifted labels `(B, T)`, -100 where ignored, as a model's `labels`; `None` for the
                token ids. The shift happens inside. Within a step of Keras what `fit` was given.
            y_pred: What Keras hands in within a step; `None` for a call of one's own.
            sample_weight: `(B,)` or `(B, T)`, or `None`.
            training: Whether to apply dropout and to add what the student adds in training.
            labels: Another name of `y` in a call of one's own.

        Returns:
            A dict of scalars: `"loss"`, `"kd_loss"` and `"task_loss"`, with a `layer_weight`
            `"layer_loss"`; in alignment `"loss"` and `"layer_3_loss"` for every aligned layer. The
            teacher's share has no gradient. Neither metrics nor counters change. Within a step of
            Keras the loss alone.
        """
        if y_pred is not None:
            losses = self._losses_of(x, y_pred, sample_weight, training)
            self._note_step(y_pred, losses, training)
            return losses.loss
        if labels is not None and y is not None:
            raise ValueError("Give the labels once. Received: `y` and `labels`")
        y = y if labels is None else labels
        self.check_batch(x, y)
        if y is not None:
            y = next_token_labels(unpack(split_stored(x)[0]), y)
        step = StepInputs(x, y)
        losses = self._losses_of(step, self(step, training=training), sample_weight, training)
        parts = {name: value for name, value in losses.parts.items() if name != "accuracy"}
        return {"loss": losses.loss, **parts}

    def _losses_of(self, step, output, sample_weight, training):
        losses = self._stage.losses(
            self.student, self.teacher, step, output, sample_weight, training
        )
        added = sum((ops.sum(extra) for extra in self.losses), start=losses.loss)
        return losses._replace(loss=added)

    def _note_step(self, output, losses, training):
        values, counts = {"loss": losses.loss, **losses.parts}, {}
        if isinstance(self._stage, Logits) and self._stage.layer_weight:
            # A mean over other tokens: `get_metrics_result` adds it to the mean of the rest.
            values["loss"] = losses.loss - self._stage.layer_weight * values["layer_loss"]
            counts["layer_loss"] = losses.real
        for mean in self.means:
            mean.update_state(values[mean.name], counts.get(mean.name, losses.count))
        self._stage.note(self.student, output, losses, training)

    def get_metrics_result(self) -> dict[str, Any]:
        """The means so far."""
        found = super().get_metrics_result()
        if isinstance(self._stage, Logits) and self._stage.layer_weight:
            found["loss"] = found["loss"] + self._stage.layer_weight * found["layer_loss"]
        return found

    def save(self, filepath: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save`, without the teacher; a `.keras` file is replaced at the end."""
        require_values(self._stepped_variables())
        path = Path(filepath)
        if path.suffix != ".keras" or kwargs or (path.exists() and not overwrite):
            super().save(filepath, overwrite=overwrite, **kwargs)
            return
        with replaced(path) as temporary:
            super().save(temporary)

    def check_data(self, x: Any, y: Any = None, **weights: Any) -> Any:
        if isinstance(x, StoredLogitsDataset):
            self._check_stored(x.stored)
        return super().check_data(x, y, **weights)

    def _settings(self):
        wanted: dict[str, Any] = {"vocab_size": self.student.config.vocab_size}
        if isinstance(self._stage, Logits):
            wanted["temperature"] = self._stage.temperature
        return wanted

    def _check_stored(self, stored):
        for name, value in self._settings().items():
            if getattr(stored, name) != value:
                raise ValueError(
                    f"Stored logits must have the `{name}` of the trainer and its student, "
                    f"{value}. Received: {name}={getattr(stored, name)} in {stored.directory}"
                )

    def check_inputs(self, x: Any, y: Any = None) -> None:
        """Raises `ValueError` for inputs that the student has no row for."""
        check_inputs(self.student.config, split_stored(x)[0])

    def check_batch(self, x: Any, y: Any) -> None:
        """Raises `ValueError` also for labels that are no class, or that a stage has no use for."""
        self.check_inputs(x)
        check_settings(x, self._settings())
        if isinstance(self._stage, Logits):
            self.student.check_targets(split_stored(x)[0], y)
            self.student.check_labels(y)
        elif y is not None:
            raise ValueError(
                "Alignment compares hidden states and has no use for labels: `y` must be None. "
                f"Received: y={shown(y)}"
            )

    def _flatten_metrics_in_order(self, logs):
        # As the student does: what it adds by itself comes with `return_dict`.
        names = {name for metric in self._student_metrics() for name in names_of(metric)}
        return super()._flatten_metrics_in_order(
            {name: value for name, value in logs.items() if name not in names}
        )

    def get_config(self) -> dict[str, Any]:
        student = keras.saving.serialize_keras_object(self.student)
        options = dataclasses.asdict(self._stage)
        return {"name": self.name, "student": student, "stage": self.stage, **options}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        student = keras.saving.deserialize_keras_object(config["student"], custom_objects)
        return cls(None, **{**config, "student": student})
