"""A model that is only asked: without gradients, and not a part of whoever asks."""

from typing import Annotated, Any

import keras
from keras import ops

from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.training.step_inputs import StepInputs
from qwen3_next.transfer.distill.layer_streams import (
    LayerOutputs,
    LayerStream,
    layer_outputs,
    layer_streams,
)


class FrozenTeacher:
    """Holds a teacher for a trainer.

    No Keras object, so that Keras neither trains nor saves the model with the trainer that has
    this for an attribute. The trainer hands `variables` to its compiled steps by itself.

    Args:
        model: `Qwen3Next`. It is left as it is, `trainable` included.
    """

    def __init__(self, model: Qwen3Next) -> None:
        self.model = model

    @property
    def variables(self) -> list[keras.Variable]:
        return self.model.variables

    def hidden(self, inputs: StepInputs) -> Annotated[Tensor, "B T D"]:
        """What the head reads."""
        return ops.stop_gradient(self.model(inputs, training=False).hidden)

    def head_kernel(self) -> Annotated[Tensor, "D V"]:
        return ops.stop_gradient(self.model.head_kernel())

    def streams(self, inputs: Any) -> tuple[LayerStream, ...]:
        """See `layer_streams`."""
        return keras.tree.map_structure(ops.stop_gradient, layer_streams(self.model, inputs))

    def outputs(self, inputs: Any) -> LayerOutputs:
        """See `layer_outputs`."""
        found = layer_outputs(self.model, inputs)
        layers = tuple(ops.stop_gradient(layer) for layer in found.layers)
        hidden = ops.stop_gradient(found.backbone.hidden)
        return LayerOutputs(layers, found.backbone._replace(hidden=hidden))


def require_language_model(name: str, model: Any) -> None:
    """Raises `ValueError` unless an argument is a `Qwen3Next`."""
    if not isinstance(model, Qwen3Next):
        raise ValueError(
            f"`{name}` must be a Qwen3Next. Received: {name} of type {type(model).__name__}"
        )


def require_pair(teacher: Any, student: Qwen3Next) -> None:
    """Raises `ValueError` unless one model can teach another its next-token distribution."""
    require_language_model("teacher", teacher)
    sizes = [model.config.vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "`teacher` and `student` must have the same `vocab_size`. "
            f"Received: vocab_size={sizes[0]} and vocab_size={sizes[1]}"
        )
    shared = {id(v) for v in teacher.variables} & {id(v) for v in student.variables}
    if shared:
        raise ValueError(
            "`teacher` and `student` must not share weights: what trains the one would change the "
            f"other. Received: models that share {len(shared)} variables"
        )


def require_same_layers(teacher: Qwen3Next, student: Qwen3Next) -> None:
    """Raises `ValueError` unless every layer of the one stands beside a layer of the other."""
    for field in ("num_layers", "hidden_size"):
        sizes = [getattr(model.config, field) for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`teacher` and `student` must have the same `{field}` to be compared by layer. "
                f"Received: {field}={sizes[0]} and {field}={sizes[1]}"
            )
    if teacher.config.etd is not None:
        raise ValueError(
            "`teacher` must have no think loop to be compared by layer. "
            f"Received: a teacher with etd={teacher.config.etd}"
        )
