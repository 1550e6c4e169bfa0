"""Keras imports TensorFlow on every backend, if it can, as soon as a seed is set.

That takes four seconds of every process, and who runs JAX need not have TensorFlow at all.
"""

import os
from pathlib import Path

from keras.src.utils import module_utils


def keras_knows_no_tensorflow() -> None:
    """Keras does without in this process; a test that imports it has it all the same."""
    module_utils.tensorflow._available = False


def environment_without_tensorflow(folder: Path) -> dict[str, str]:
    """Variables for another process, in which TensorFlow cannot be imported.

    Args:
        folder: An empty one, for the module that is found in its place.
    """
    (folder / "tensorflow.py").write_text("raise ImportError('not in this test')\n")
    others = filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join([str(folder), *others])}
