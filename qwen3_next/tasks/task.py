"""What a head adds to a backbone: presets, losses from logits, checked training inputs."""

from pathlib import Path
from typing import Any, Self

import keras

from qwen3_next.checkpoints.interchange import export_hugging_face
from qwen3_next.checkpoints.presets import from_preset, save_to_preset
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.inputs import check_token_ids

LOSSES_FROM_LOGITS = {
    "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy,
    "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
    "binary_crossentropy": keras.losses.BinaryCrossentropy,
}


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
        """As `keras.Model.compile`; cross-entropies given by name are taken from logits."""
        if isinstance(loss, str) and loss in LOSSES_FROM_LOGITS:
            loss = LOSSES_FROM_LOGITS[loss](from_logits=True)
        if getattr(loss, "from_logits", True) is False:
            raise ValueError(
                f"{type(self).__name__} returns logits: give the loss by name or with "
                f"`from_logits=True`. Received: loss={loss}"
            )
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        check_token_ids(x, self.config.vocab_size)
        return super().predict(x, *args, **kwargs)
