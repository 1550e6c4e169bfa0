"""What runs through the layers of a model: the residual stream, and what every mixer adds to it.

h_0 = embedding,   a_i = mixer_i(norm_i(h_i)),   h_{i+1} = h_i + a_i + mlp_i(norm'_i(h_i + a_i))

layer_streams    h_i, a_i and h_{i+1} of every layer, as a model that is not trained gives them
layer_outputs    h_{i+1} of every layer, with all that the backbone gives, in training, too
"""

from typing import Annotated, Any, NamedTuple

from keras import ops

from qwen3_next.layers import DecoderLayer, Routing, SparseMoE
from qwen3_next.layers.mixer_context import MixerContext
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.backbone import BackboneOutput, Qwen3NextBackbone, balance
from qwen3_next.models.decisions import check_decisions
from qwen3_next.models.inputs import Inputs, check_token_ids, unpack
from qwen3_next.tasks.task import Task


class LayerStream(NamedTuple):
    """What runs through one layer.

    Attributes:
        hidden: `(B, T, D)`, which the layer reads, before its norm.
        mixed: `(B, T, D)`, what its mixer adds.
        output: `(B, T, D)`, which the layer returns.
    """

    hidden: Tensor
    mixed: Tensor
    output: Tensor


class LayerOutputs(NamedTuple):
    """A pass through the backbone, layer by layer.

    Attributes:
        layers: `(B, T, D)` of every layer, what it returns.
        backbone: `BackboneOutput`.
    """

    layers: tuple[Tensor, ...]
    backbone: BackboneOutput


def layer_streams(model: Task | Qwen3NextBackbone, inputs: Any) -> tuple[LayerStream, ...]:
    """The residual stream at every layer of a model, in one pass and without dropout.

    Args:
        model: `Qwen3Next`, `Qwen3NextClassifier` or `Qwen3NextBackbone`, without a think loop.
        inputs: Token ids `(B, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"` and
            `"segment_ids"`.

    Returns:
        A `LayerStream` for every decoder layer.

    Raises:
        ValueError: no model, a model with a think loop (which runs a layer more than once), or
            inputs that the model would refuse.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.distill.layer_streams import layer_streams

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=2)
    first, second = layer_streams(model, np.ones((1, 4), "int32"))
    assert first.mixed.shape == second.hidden.shape == (1, 4, 32)
    ```
    """
    backbone, inputs = _checked(model, inputs)
    hidden = backbone.embed_tokens(inputs.token_ids)
    streams = []
    for layer in backbone.decoder_layers:
        before = ops.cast(hidden, layer.compute_dtype)
        mixed = ops.cast(mixer_output(layer, before, inputs), before.dtype)
        hidden = before + mixed
        fed = layer.post_attention_layernorm(hidden)
        routed = isinstance(layer.mlp, SparseMoE)
        fed = layer.mlp(fed, padding_mask=inputs.padding_mask) if routed else layer.mlp(fed)
        hidden = hidden + ops.cast(fed, hidden.dtype)
        streams.append(LayerStream(before, mixed, hidden))
    return tuple(streams)


def mixer_output(
    layer: DecoderLayer,
    hidden: Annotated[Tensor, "B T D"],
    inputs: Inputs,
    training: bool = False,
) -> Annotated[Tensor, "B T D"]:
    """`mixer(norm(hidden))` of a layer, for the masks of `inputs`."""
    seed = layer.draw_dropout_seeds(training).mixer
    context = MixerContext(
        inputs.padding_mask, inputs.segment_ids, dropout_seed=seed, training=training
    )
    normed = layer.input_layernorm(ops.cast(hidden, layer.compute_dtype))
    return layer.mixer(normed, **context._asdict())


def layer_outputs(
    model: Task | Qwen3NextBackbone, inputs: Any, training: bool = False
) -> LayerOutputs:
    """What every layer returns, beside what the backbone returns.

    Args:
        model: As for `layer_streams`.
        inputs: As for `layer_streams`.
        training: Whether to apply dropout and checkpointing.

    Raises:
        ValueError: as `layer_streams`.
    """
    backbone, inputs = _checked(model, inputs)
    hidden = backbone.embed_tokens(inputs.token_ids)
    outputs, routings = [], []
    for layer in backbone.decoder_layers:
        hidden, _, routing = layer(
            hidden,
            padding_mask=inputs.padding_mask,
            segment_ids=inputs.segment_ids,
            full_output=True,
            training=training,
        )
        outputs.append(hidden)
        routings += [routing] if isinstance(routing, Routing) else []
    aux_loss, expert_load = balance(backbone.config, routings)
    found = BackboneOutput(
        backbone.norm(hidden),
        hidden,
        aux_loss=aux_loss,
        expert_load=expert_load,
        routings=tuple(routings),
    )
    return LayerOutputs(tuple(outputs), found)


def _checked(model: Any, inputs: Any) -> tuple[Qwen3NextBackbone, Inputs]:
    if not isinstance(model, Task | Qwen3NextBackbone):
        raise ValueError(
            "`model` must be a Qwen3Next, a Qwen3NextClassifier or a Qwen3NextBackbone. "
            f"Received: model of type {type(model).__name__}"
        )
    config = model.config
    if config.etd is not None:
        raise ValueError(
            "`model` must have no think loop, which runs layers more than once. "
            f"Received: a model with etd={config.etd}"
        )
    check_token_ids(inputs, config.vocab_size)
    inputs = unpack(inputs)
    check_decisions(config, inputs)
    length, longest = inputs.token_ids.shape[1], config.max_position_embeddings
    if length is not None and length > longest:
        raise ValueError(
            f"`inputs` must have at most `max_position_embeddings`={longest} tokens per row. "
            f"Received: {length} tokens"
        )
    return model if isinstance(model, Qwen3NextBackbone) else model.backbone, inputs
