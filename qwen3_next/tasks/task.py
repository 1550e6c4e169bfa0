"""What a head adds to a backbone: presets, losses from logits, checked training inputs."""

import contextlib
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from qwen3_next.checkpoints.interchange import export_hugging_face
from qwen3_next.checkpoints.presets import from_preset, save_to_preset
from qwen3_next.config.model_config import LINEAR
from qwen3_next.layers.ops.backend.programs import one_replica
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.decisions import check_inputs
from qwen3_next.models.placement import check_placement
from qwen3_next.models.strategies import require_strategy_of, strategy_of
from qwen3_next.tasks.checked_data import (
    by_name,
    check_class_weight,
    check_rows,
    checked,
    fit_options,
    refuse_class_weight,
    values_kept,
)
from qwen3_next.tasks.iterations_of_run import IterationsOfRun
from qwen3_next.tasks.keras_files import KerasFiles
from qwen3_next.tasks.losses_from_logits import loss_from_logits
from qwen3_next.tasks.metrics_from_logits import metrics_from_logits
from qwen3_next.tasks.rows_on_devices import (
    all_rows_everywhere,
    brought_together,
    check_batch_size,
    check_steps_at_once,
    own_rows,
    refused_by_all,
    rows_by_device,
)
from qwen3_next.tasks.running_on_replicas import Replicas
from qwen3_next.tasks.stale_functions import check_trained_variables, drop_stale_functions
from qwen3_next.training.replicas_of_step import train_on_replica
from qwen3_next.training.thinking_metrics import ACTIONS, names_of, thinking_results


def build_optimizer(model: keras.Model) -> None:
    """Makes the variables of a model's optimizer before its first step: TensorFlow would trace a
    step that makes variables once more. They live where the model's weights do."""
    check_placement(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        strategy = strategy_of(model)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            optimizer.build(model.trainable_variables)
    if optimizer is not None:
        check_trained_variables(model)


class Task(IterationsOfRun, Replicas, KerasFiles, ConfiguredModel):
    """A model with a head, ready for `compile`, `fit`, `evaluate` and `predict`.

    The models return logits, so the names of the cross-entropy losses mean them from logits.
    """

    labels_are_indices: bool = True  # whatever the loss
    predict_function: Any
    thinking_metrics: list[keras.metrics.Metric]
    thinking_of_generation: dict[str, Any] | None = None  # of the last call of `generate`

    @classmethod
    def from_preset(
        cls, preset: str | Path, *, dtype: Any = None, progress: bool = True, **options: Any
    ) -> Self:
        """Loads a model with its weights, in the published layout or as `save_to_preset` left it.

        What became of every tensor is then in the model's `coverage_report`.

        Args:
            preset: A directory, or `"hf://owner/name"`.
            dtype: Dtype policy of all layers. `None` for the saved one, or for published
                checkpoints Keras' default.
            progress: Whether to show a progress bar and print the coverage report.
            **options: Fields of `Qwen3NextConfig` to replace, or other constructor arguments.

        Raises:
            ValueError: a directory without a model, a setting that has no counterpart here, or a
                checkpoint that is damaged or does not fit.
        """
        return from_preset(cls, preset, dtype=dtype, progress=progress, **options)

    def save_to_preset(self, directory: str | Path, max_shard_size: str | int = "5GB") -> None:
        """Writes configuration and weights to a directory that `from_preset` reads.

        Files of that name are replaced once everything is written.

        Args:
            directory: Where to write.
            max_shard_size: Size of a file, a string such as `"5GB"` or a number of bytes.

        Raises:
            ValueError: a model that `from_preset` could not read back: variables that were added
                (as by LoRA), or a class that is not registered with Keras.
        """
        save_to_preset(self, directory, max_shard_size)

    def export_to_transformers(
        self,
        directory: str | Path,
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Writes `config.json` and the weights as transformers reads them.

        Files of that name are replaced once everything is written.

        Args:
            directory: Where to write.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`. `None` for the dtype of each variable.
            max_shard_size: Size of a file, a string such as `"5GB"` or a number of bytes.

        Raises:
            ValueError: a configuration that no published model type can express.
        """
        export_hugging_face(self, directory, dtype, max_shard_size)

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: Any = "sparse_categorical_crossentropy",
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.compile`; losses and metrics given by name are those of logits."""
        loss = loss_from_logits(loss, self.labels_are_indices)
        self.forget_functions()
        self.check_compilation(loss, kwargs)
        outputs = self.output_shape_of(None, None)[-1]
        metrics, kwargs["weighted_metrics"] = (
            metrics_from_logits(given, loss, outputs)
            for given in (metrics, kwargs.get("weighted_metrics"))
        )
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)
        self.check_optimizer()

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def get_metrics(self) -> dict[str, dict[str, Any]]:
        """What the last `fit`, `evaluate` or `generate` found: means over tokens, by part.

        `"etd"`, of a model with a think loop: `think_iterations`, `early_exit` (share of tokens
        that left before the last iteration) and `exit_confidence` (sum of halting probabilities);
        with layer routers `router_actions`, for every think layer how many rows skipped, ran and
        repeated it; with LoRA experts `expert_selections`, how often each was chosen.

        Example:

        ```python
        import numpy as np
        from qwen3_next import ETDConfig, Qwen3Next

        etd = ETDConfig(0, 1, 0, max_think_iterations=2, adaptive_depth=False)
        model = Qwen3Next.from_variant(
            "tiny", vocab_size=64, hidden_size=32, num_layers=1, etd=etd
        )
        model.compile("adamw")
        model.fit(np.ones((2, 8), "int32"), verbose=0)
        assert model.get_metrics()["etd"]["think_iterations"] == 2
        ```
        """
        if self.config.etd is None:
            return {}
        noted = self.thinking_of_generation
        return {"etd": thinking_results(self.thinking_metrics) if noted is None else dict(noted)}

    def get_router_stats(self) -> dict[str, Any]:
        """What the layer routers did in the last `fit`, `evaluate` or `generate`.

        `skip_count`, `execute_count` and `repeat_count` over rows and think layers, and the layers
        of the model that some row skipped or repeated, `skip_layers` and `repeat_layers`.

        Raises:
            ValueError: a model without layer routers.
        """
        etd = self.config.etd
        if etd is None or not etd.use_layer_router:
            raise ValueError(
                "`get_router_stats` needs a model with layer routers, "
                f"`ETDConfig(use_layer_router=True)`. Received: etd={etd}"
            )
        nothing = [[0, 0, 0]] * etd.n_think_layers
        counts = np.array(self.get_metrics()["etd"].get("router_actions", nothing))
        total, layers = counts.sum(0), etd.n_encoder_layers + np.arange(len(counts))
        found = {f"{name}_count": int(n) for name, n in zip(ACTIONS, total)}
        for action in (0, 2):
            found[f"{ACTIONS[action]}_layers"] = layers[counts[:, action] > 0].tolist()
        return found

    def get_layer_stats(self) -> dict[str, int]:
        """How many layers have which mixer: `deltanet_layers`, `gated_attention_layers`,
        `group_query_attention_layers` (without an output gate) and `total_layers`."""
        linear = self.config.layer_types.count(LINEAR)
        full = self.config.num_layers - linear
        gated = full if self.config.attention_type == "gated_attention" else 0
        return {
            "deltanet_layers": linear,
            "gated_attention_layers": gated,
            "group_query_attention_layers": full - gated,
            "total_layers": self.config.num_layers,
        }

    def reset_stats(self) -> None:
        """Forgets what `get_metrics` and `get_router_stats` tell."""
        self.thinking_of_generation = None
        for metric in self.thinking_metrics:
            metric.reset_state()

    def update_expert_bias(self, rate: float | None = None) -> None:
        """Moves the selection bias of LoRA experts by the sign rule; `fit` does it after each step.

        For a training loop of one's own: a call with `training=True` notes what was chosen.

        Args:
            rate: Step, by default the configuration's `bias_update_rate`.

        Raises:
            ValueError: a rate that is no number of at least 0.
        """
        self.backbone.update_expert_bias(rate)

    def check_batch(self, x: Any, y: Any) -> None:
        """Raises `ValueError` for token ids, decisions or labels that the model has no row for.

        Labels are checked where the loss takes them for indices.
        """
        check_inputs(self.config, x)
        if isinstance(getattr(self, "loss", None), keras.losses.SparseCategoricalCrossentropy):
            self.check_labels(y)

    @property
    def has_one_label(self) -> bool:
        """Whether each row has one label."""
        return False

    def check_labels(self, labels: Any) -> None:
        """Raises `ValueError` for labels that are no class of the model."""
        raise NotImplementedError

    def fit(self, x=None, y=None, batch_size=None, *args, **kwargs):
        given = fit_options(args, kwargs)
        validation_data = given.pop("validation_data", None)
        require_strategy_of(self, "fit")
        drop_stale_functions(self)
        self.thinking_of_generation = None
        check_batch_size(x, batch_size, given.get("steps_per_epoch"))
        validates, held_out = isinstance(validation_data, list | tuple), "validation_data"
        validated, labels, weight = keras.utils.unpack_x_y_sample_weight(validation_data)
        if validates:
            size = given.get("validation_batch_size") or batch_size
            check_batch_size(validated, size, given.get("validation_steps"))
        with refused_by_all():
            if validates:
                checked(self.check_batch, validated, labels, name=held_out, sample_weight=weight)
            elif validation_data is not None:
                validation_data = checked(self.check_batch, validation_data, name=held_out)
            weight, class_weight = given.get("sample_weight"), given.get("class_weight")
            x = checked(self.check_batch, x, y, sample_weight=weight, class_weight=class_weight)
            self._check_class_weight(class_weight)
        build_optimizer(self)
        with self._running_over_data():
            return super().fit(x, y, batch_size, validation_data=validation_data, **given)

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        *args,
        think_iterations=None,
        **kwargs,
    ):
        """As `keras.Model.evaluate`, with so many `think_iterations` if it says so."""
        require_strategy_of(self, "evaluate")
        drop_stale_functions(self)
        self.thinking_of_generation = None
        check_batch_size(x, batch_size, steps)
        with refused_by_all():
            x = checked(self.check_batch, x, y, sample_weight=sample_weight)
        iterating = self.iterating("test_function", think_iterations)
        with iterating, self._running_over_data():
            given = x, y, batch_size, verbose, sample_weight, steps
            return super().evaluate(*given, *args, **kwargs)

    def predict(
        self,
        x,
        batch_size=None,
        verbose="auto",
        steps=None,
        *args,
        think_iterations=None,
        **kwargs,
    ):
        """As `keras.Model.predict`, with so many `think_iterations` if it says so.

        Each of several processes brings its own rows and is given what belongs to them.
        """
        require_strategy_of(self, "predict")
        drop_stale_functions(self)
        check_batch_size(x, batch_size, steps)
        check_steps_at_once(getattr(self, "steps_per_execution", 1))
        with refused_by_all():
            x = checked(self._check_inputs, x)
        iterating = self.iterating("predict_function", think_iterations)
        with iterating, self._running_over_data():
            return super().predict(x, batch_size, verbose, steps, *args, **kwargs)

    @contextlib.contextmanager
    def _running_over_data(self):
        with all_rows_everywhere(), values_kept(self, self._stepped_variables()):
            yield

    def train_step(self, *args):
        if self.adds_up_first():
            return train_on_replica(self, *args)
        *state, data = args
        with one_replica():
            return super().train_step(*state, rows_by_device(data))

    def test_step(self, *args):
        *state, data = args
        return super().test_step(*state, rows_by_device(data))

    def predict_step(self, *args):
        *state, data = args
        found = super().predict_step(*state, rows_by_device(data))
        if not state:
            return found
        outputs, *state = found
        return rows_by_device(outputs), *state

    def make_predict_function(self, force=False):
        known = self.predict_function
        super().make_predict_function(force)
        if keras.backend.backend() == "jax" and self.predict_function is not known:
            self.predict_function = own_rows(self.predict_function)
        return self.predict_function

    def train_on_batch(self, x, y=None, *args, **kwargs):
        given = by_name("train_on_batch", 2, args, kwargs)
        check_rows(self.check_batch, x, y, given.get("sample_weight"))
        self._check_class_weight(given.get("class_weight"))
        drop_stale_functions(self)
        build_optimizer(self)
        with all_rows_everywhere():
            return super().train_on_batch(x, y, **given)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        given = by_name("test_on_batch", 2, args, kwargs)
        check_rows(self.check_batch, x, y, given.get("sample_weight"))
        drop_stale_functions(self)
        with all_rows_everywhere():
            return super().test_on_batch(x, y, **given)

    def predict_on_batch(self, x):
        self._check_inputs(x)
        drop_stale_functions(self)
        return super().predict_on_batch(brought_together(x))

    def step_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that a step updates by itself."""
        return self.thinking_metrics

    def _flatten_metrics_in_order(self, logs):
        # Keras lists what was compiled, or returns the loss alone; the metrics that a step adds by
        # itself are in the logs and come with `return_dict`.
        names = {name for metric in self.step_metrics() for name in names_of(metric)}
        return super()._flatten_metrics_in_order(
            {name: value for name, value in logs.items() if name not in names}
        )

    def _stepped_variables(self):
        optimizer = getattr(self, "optimizer", None)
        own = optimizer.variables if optimizer is not None else []
        return [*self.variables, *own, *self.metrics_variables]

    def _check_inputs(self, x, y=None):
        check_inputs(self.config, x)

    def _check_class_weight(self, class_weight):
        if not self.has_one_label:
            refuse_class_weight(class_weight)
        check_class_weight(class_weight, self.output_shape_of(None, None)[-1])
