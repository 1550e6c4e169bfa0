"""What a head adds to a backbone: presets, losses from logits, checked training inputs."""

from pathlib import Path
from typing import Any, Self

import keras

from qwen3_next.checkpoints.interchange import export_hugging_face
from qwen3_next.checkpoints.presets import from_preset, save_to_preset
from qwen3_next.checkpoints.staging import replaced
from qwen3_next.layers.ops.backend.programs import one_replica
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.inputs import check_token_ids
from qwen3_next.tasks.checked_data import checked, values_kept
from qwen3_next.tasks.losses_from_logits import loss_from_logits


class Task(ConfiguredModel):
    """A model with a head, ready for `compile`, `fit`, `evaluate` and `predict`.

    The models return logits, so the names of the cross-entropy losses mean them from logits.
    """

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

    def save(self, filepath: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save`; a `.keras` file is replaced once the new one is on the disk."""
        self._replace(super().save, ".keras", filepath, overwrite, kwargs)

    def save_weights(self, filepath: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save_weights`; the file is replaced once the new one is on the disk."""
        self._replace(super().save_weights, ".weights.h5", filepath, overwrite, kwargs)

    def _replace(self, save, suffix, filepath, overwrite, options):
        path = Path(filepath)
        asks_first = not overwrite and path.exists()
        if asks_first or options or not path.name.endswith(suffix):  # Keras has other formats
            save(filepath, overwrite=overwrite, **options)
            return
        with replaced(path) as temporary:
            save(temporary)

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
        """As `keras.Model.compile`; cross-entropies given by name are taken from logits."""
        loss = loss_from_logits(loss)
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def check_batch(self, x: Any, y: Any) -> None:
        """Raises `ValueError` for token ids or labels that the model has no row for.

        Labels are checked where the loss takes them for indices.
        """
        check_token_ids(x, self.config.vocab_size)
        if isinstance(getattr(self, "loss", None), keras.losses.SparseCategoricalCrossentropy):
            self.check_labels(y)

    def check_labels(self, labels: Any) -> None:
        """Raises `ValueError` for labels that are no class of the model."""
        raise NotImplementedError

    def fit(self, x=None, y=None, *args, validation_data=None, **kwargs):
        if isinstance(validation_data, list | tuple):
            self.check_batch(*validation_data[:2])
        elif validation_data is not None:
            validation_data = checked(self.check_batch, validation_data)
        x = checked(self.check_batch, x, y)
        with values_kept(self, self._stepped_variables()):
            return super().fit(x, y, *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        x = checked(self.check_batch, x, y)
        with values_kept(self, self._stepped_variables()):
            return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        x = checked(self._check_inputs, x)
        with values_kept(self, self._stepped_variables()):
            return super().predict(x, *args, **kwargs)

    def train_step(self, *args):
        with one_replica():
            return super().train_step(*args)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        self.check_batch(x, y)
        return super().train_on_batch(x, y, *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        self.check_batch(x, y)
        return super().test_on_batch(x, y, *args, **kwargs)

    def predict_on_batch(self, x):
        self._check_inputs(x)
        return super().predict_on_batch(x)

    def _stepped_variables(self):
        optimizer = getattr(self, "optimizer", None)
        own = optimizer.variables if optimizer is not None else []
        return [*self.variables, *own, *self.metrics_variables]

    def _check_inputs(self, x, y=None):
        check_token_ids(x, self.config.vocab_size)
