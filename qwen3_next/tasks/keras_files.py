"""Keras' own files of a model, replaced and loaded whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from qwen3_next.checkpoints.shared_saving import save_by_keras
from qwen3_next.checkpoints.staging import replaced
from qwen3_next.checkpoints.weights_of_file import require_weights_of


class KerasFiles(keras.Model):
    """A mixin of models that say which variables a step changes."""

    _stepped_variables: Callable[[], list[keras.Variable]]

    def save(self, filepath: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save`; a `.keras` file is replaced once the new one is on the disk."""
        self._replace(super().save, ".keras", filepath, overwrite, kwargs)

    def save_weights(self, filepath: str | Path, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save_weights`; the file is replaced once the new one is on the disk."""
        self._replace(super().save_weights, ".weights.h5", filepath, overwrite, kwargs)

    def load_weights(
        self, filepath: str | Path, skip_mismatch: bool = False, **kwargs: Any
    ) -> None:
        """As `keras.Model.load_weights`; a `.weights.h5` file must be that of such a model.

        Raises:
            ValueError: a file with other weights, without `skip_mismatch`. Nothing is loaded then.
        """
        if not skip_mismatch and not kwargs and str(filepath).endswith(".weights.h5"):
            require_weights_of(self, filepath)
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def _replace(self, save, suffix, filepath, overwrite, options):
        path = Path(filepath)
        asks_first = not overwrite and path.exists()

        def replace():
            if asks_first or options or not path.name.endswith(suffix):  # Keras has other formats
                save(filepath, overwrite=overwrite, **options)
                return
            with replaced(path) as temporary:
                save(temporary)

        save_by_keras(
            replace, lambda folder: save(folder / f"order{suffix}"), self._stepped_variables()
        )
