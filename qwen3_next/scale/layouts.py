"""Layouts of variables for `keras.distribution`, from the rows of the weight table."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, Rule, optional_integer, require
from qwen3_next.models.configured_model import ConfiguredModel
from qwen3_next.models.weight_rows import Weight
from qwen3_next.models.weight_table import weight_table
from qwen3_next.scale.mesh_sizes import mesh_text, sizes_of
from qwen3_next.scale.sharding_rules import Axes, Sharding, sharding_of
from qwen3_next.scale.weight_patterns import patterns_of, row_at

# What is no weight of a model (counters, seeds, metrics, LoRA) may be whole on each device.
SMALL_BYTES = 2**20
NUM_LABELS = optional_integer(1)
_MESH = Rule("a DeviceMesh", lambda mesh: isinstance(mesh, keras.distribution.DeviceMesh))


class MeshLayout(keras.distribution.TensorLayout):
    """A layout whose dims may be split over several axes of the mesh, as JAX allows."""

    def _validate_axes(self):
        # Keras' own check knows of one axis for each dim: it gets them one by one.
        nested = (names if isinstance(names, tuple) else (names,) for names in self.axes)
        flat = tuple(name for names in nested for name in names)
        keras.distribution.TensorLayout(flat, self.device_mesh)


def layout_map(
    mesh: keras.distribution.DeviceMesh,
    model: str | Qwen3NextConfig | ConfiguredModel,
    *,
    fsdp: bool = False,
    num_labels: int | None = None,
) -> keras.distribution.LayoutMap:
    """Where each weight of a model lives, for `keras.distribution.ModelParallel`.

    Args:
        mesh: Devices with axes out of `data`, `expert` and `tensor`. Experts are split over
            `expert` and `tensor` together where that divides them, heads, feed-forward networks
            and the vocabulary over `tensor`.
        model: Name of a variant, configuration, or a model like the one to be made.
        fsdp: Whether matrices are split over `data`, too, along the residual stream.
        num_labels: Classes of a classifier, `None` for a language model.

    Returns:
        A `keras.distribution.LayoutMap` whose keys match the weights' paths, also inside of another
        model.

    Raises:
        ValueError: unknown axes of the mesh, one that does not divide what it should split, or a
            number of labels below 1.
        RuntimeError: another backend than JAX.

    Example:

    ```python
    import keras
    from qwen3_next import Qwen3Next, layout_map

    mesh = keras.distribution.DeviceMesh((1, 1, 1), ("data", "expert", "tensor"), ["cpu:0"])
    layouts = layout_map(mesh, "tiny")
    assert layouts["model/layers_0/mlp/experts/down"].axes == (None, None, None)  # one device
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
    with parallel.scope():
        model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    ```
    """
    require_jax("layout_map")
    require(_MESH, "mesh", mesh)
    require(BOOLEAN, "fsdp", fsdp)
    require(NUM_LABELS, "num_labels", num_labels)
    sizes = sizes_of(mesh)
    layouts = keras.distribution.LayoutMap(mesh)
    for key, row in patterns_of(rows_of(model, num_labels)).items():
        layouts[key] = MeshLayout(sharding_of(row, sizes, fsdp).axes, mesh)
    return layouts


def rows_of(model: Any, num_labels: int | None = None) -> list[Weight]:
    """The weight table of a variant, a configuration or a model."""
    return weight_table(config_of(model), getattr(model, "num_labels", num_labels))


def config_of(model: Any) -> Qwen3NextConfig:
    """The configuration of a variant or a model, or the one that is given."""
    if isinstance(model, ConfiguredModel):
        return model.config
    if isinstance(model, str):
        return Qwen3NextConfig.from_variant(model)
    if not isinstance(model, Qwen3NextConfig):
        raise ValueError(
            f"`model` must be a variant's name, a Qwen3NextConfig or a model. Received: {model=}"
        )
    return model


def sharding_at(
    path: str, shape: Sequence[int], sizes: dict[str, int], fsdp: bool = False
) -> Sharding:
    """How a variable is split that is known by its path: a weight, or something small.

    Raises:
        ValueError: a dim that the mesh does not divide, or a large variable that no row of the
            weight table stands for.
    """
    row = row_at(path, len(shape))
    if row is not None:
        return sharding_of(row._replace(path=path, shape=tuple(shape)), sizes, fsdp)
    whole: Axes = (None,) * len(shape)
    if math.prod(shape) * 4 < SMALL_BYTES:
        return Sharding(whole, "small, no weight of the model")
    raise ValueError(
        f"`{path}` is large and no weight of the models of this package: say how it is split with "
        f"`layouts`, or that it is not. Received: shape={tuple(shape)}, mesh={mesh_text(sizes)!r}"
    )


def require_jax(name: str) -> None:
    """Raises `RuntimeError` on a backend that `keras.distribution` does not shard on."""
    backend = keras.backend.backend()
    if backend != "jax":
        raise RuntimeError(
            f"`{name}` needs the JAX backend, the one that `keras.distribution` splits weights on. "
            "On TensorFlow, models made under `tf.distribute.MirroredStrategy` train on several "
            f"devices, data parallel. Received: {backend=}"
        )
