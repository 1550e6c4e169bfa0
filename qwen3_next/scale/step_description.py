"""What a training step costs on a mesh: memory of a device, and what devices send one another.

The step is compiled for shapes alone: no weight is allocated, and a machine with simulated devices
can ask about models that it could never hold.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import BOOLEAN, Rule, integer, one_of, require
from qwen3_next.layers.initializers import weights_to_be_loaded
from qwen3_next.models.description import DTYPE_BYTES, bytes_text
from qwen3_next.scale.collectives import Collective, collectives, largest_arrays
from qwen3_next.scale.distributing import distribute
from qwen3_next.scale.layouts import config_of, require_jax
from qwen3_next.scale.least_traffic import least_traffic
from qwen3_next.scale.mesh_sizes import devices_in, mesh_text, sizes_of
from qwen3_next.tasks.language_model import Qwen3Next

_LANGUAGE_MODEL = Rule(
    "a variant's name, a Qwen3NextConfig or a Qwen3Next",
    lambda model: isinstance(model, str | Qwen3NextConfig | Qwen3Next),
)


@dataclass(frozen=True)
class StepDescription:
    """A compiled training step; `print` it for a table.

    Attributes:
        mesh: Sizes of the mesh's axes.
        tokens: Tokens of a batch.
        collectives: What devices do together, the costliest first.
        least: Bytes that a device receives at least, by what they are; empty where the model has
            parts that are not reckoned (multi-token prediction, a think loop).
        state_bytes: What a device holds between steps: weights, optimizer, metrics.
        work_bytes: What it needs beside them during a step, as the compiler says.
        arrays: Bytes of the arrays that a device makes, by shape, the largest first.

    Example:

    ```python
    from qwen3_next import Qwen3NextConfig, describe_step

    config = Qwen3NextConfig.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    step = describe_step(config, "data=1", batch_size=1, length=8)
    assert step.state_bytes > 3 * 4 * 64 * 32  # the embedding and AdamW's means of its gradients
    assert "held between steps" in str(step)
    ```
    """

    mesh: dict[str, int]
    tokens: int
    collectives: tuple[Collective, ...]
    least: dict[str, float]
    state_bytes: int
    work_bytes: int
    arrays: dict[tuple[int, ...], int]

    @property
    def received(self) -> float:
        """Bytes that a device receives in a step."""
        return sum(row.received for row in self.collectives)

    def __str__(self) -> str:
        lines = [f"{mesh_text(self.mesh)}, {self.tokens:,} tokens in a step", ""]
        lines.append(f"{'collective':<20}{'over':<22}{'times':>6}{'received':>13}  where")
        for row in self.collectives:
            over = " + ".join(row.axes)
            size = bytes_text(int(row.received))
            lines.append(f"{row.kind:<20}{over:<22}{row.times:>6}{size:>13}  {row.place}")
        lines += ["", f"{'received in all':<48}{bytes_text(int(self.received)):>13}"]
        if self.least:
            least = sum(self.least.values())
            parts = ", ".join(f"{name} {bytes_text(int(n))}" for name, n in self.least.items())
            lines.append(f"{'least possible':<48}{bytes_text(int(least)):>13}  {parts}")
        lines.append(f"{'held between steps':<48}{bytes_text(self.state_bytes):>13}")
        lines.append(f"{'needed during a step':<48}{bytes_text(self.work_bytes):>13}")
        return "\n".join(lines)


def describe_step(
    model: str | Qwen3NextConfig | Qwen3Next,
    mesh: str,
    *,
    batch_size: int,
    length: int,
    fsdp: bool = False,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> StepDescription:
    """Compiles a training step (AdamW) for a mesh, without weights or data, and reads it. JAX only.

    Bytes are those of the compiler that runs: on a CPU, XLA sends bfloat16 as float32, and sums
    that other compilers would merge stand alone.

    Args:
        model: Name of a variant, configuration, or a language model.
        mesh: As for `distribute`; there must be as many devices, which may be simulated ones.
        batch_size: Rows of a batch.
        length: Tokens of a row.
        fsdp: As for `distribute`.
        dtype: Dtype of weights and activations.
        gradient_checkpointing: As for `Qwen3Next`.

    Returns:
        `StepDescription`.

    Raises:
        ValueError: another model than a language model, a mesh that does not fit the devices or
            the model, or numbers out of range.
        RuntimeError: another backend than JAX.

    Example:

    ```python
    from qwen3_next import Qwen3NextConfig, describe_step

    config = Qwen3NextConfig.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=1)
    step = describe_step(config, "data=1", batch_size=1, length=8)
    assert step.received == 0  # one device has nobody to hear from
    ```
    """
    require_jax("describe_step")
    require(_LANGUAGE_MODEL, "model", model)
    require(integer(1), "batch_size", batch_size)
    require(integer(1), "length", length)
    require(one_of(DTYPE_BYTES), "dtype", dtype)
    require(BOOLEAN, "gradient_checkpointing", gradient_checkpointing)
    config = config_of(model)
    with _distributed(mesh, fsdp) as parallel:
        compiled = _compiled_step(
            config, parallel, (batch_size, length), dtype, gradient_checkpointing
        )
    text, sizes, memory = compiled.as_text(), parallel.sizes, compiled.memory_analysis()
    least = {}
    if config.mtp is None and config.etd is None:
        least = least_traffic(config, sizes, batch_size * length, dtype, fsdp)
    return StepDescription(
        mesh=sizes,
        tokens=batch_size * length,
        collectives=tuple(collectives(text, sizes)),
        least=least,
        state_bytes=memory.argument_size_in_bytes,
        work_bytes=memory.temp_size_in_bytes,
        arrays=largest_arrays(text),
    )


@contextlib.contextmanager
def _distributed(mesh: str, fsdp: bool) -> Iterator[Any]:
    before = keras.distribution.distribution()
    devices = keras.distribution.list_devices()[: devices_in(sizes_of(mesh))]
    try:
        yield distribute(mesh, fsdp=fsdp, devices=devices)
    finally:
        keras.distribution.set_distribution(before)


def _compiled_step(config, parallel, shape, dtype, gradient_checkpointing):
    import jax

    model = _abstract_model(config, parallel, dtype, gradient_checkpointing)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([_abstract(v, parallel) for v in group] for group in groups)
    layout = parallel.get_data_layout(shape).backend_layout
    ids = jax.ShapeDtypeStruct(shape, "int32", sharding=layout)
    places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, places))
    return step.lower(state, (ids,)).compile()


def _abstract_model(config, parallel, dtype, gradient_checkpointing):
    """A model ready for its first step, without a value."""
    import jax

    models = []

    def make():
        models.append(Qwen3Next(config, dtype=dtype, gradient_checkpointing=gradient_checkpointing))

    # A layout would send values, which the host draws, to the devices.
    keras.distribution.set_distribution(None)
    with weights_to_be_loaded():
        jax.eval_shape(make)
    keras.distribution.set_distribution(parallel)
    (model,) = models
    for variable in model.variables:
        variable._layout = parallel.get_variable_layout(variable)

    def prepare():
        model.compile(keras.optimizers.AdamW())
        model.optimizer.build(model.trainable_variables)

    jax.eval_shape(prepare)
    return model


def _abstract(variable, parallel):
    import jax

    layout = parallel.get_variable_layout(variable)
    place = getattr(layout, "backend_layout", layout)
    return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=place)
