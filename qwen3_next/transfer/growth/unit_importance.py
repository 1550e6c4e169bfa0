"""How much the layers, channels, units and experts of a model matter.

Measured on tokens (`activation`), means over them:

    layer     1 - cos(x_in, x_out)            block influence, what the layer changes
    channel   sum over norms of norm(x)_c^2   energy of a channel of the residual stream
    unit      h_u^2 |W_down[u]|^2             what a unit h of a dense network adds to the stream
    expert    p_e                             probability that the router gives it

An MTP module that runs several steps is measured in the first of them.

Without tokens (`weight_norm`), of the weights alone:

    layer     |W_out|^2 + |W_down|^2          what writes to the stream; experts count as their mean
    channel   sum over weights of its share of their squares
    unit      |W_gate[u]| |W_up[u]| |W_down[u]|, the same of an expert as a whole

Reference: ShortGPT, arXiv 2403.03853 (block influence); Minitron, arXiv 2407.14679 (width).
"""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
from keras import ops

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.generation.prompts import SMALLEST_CHUNK, bucket
from qwen3_next.layers import DecoderLayer, SparseMoE, SwiGLU
from qwen3_next.layers.ops.activations import ACTIVATIONS
from qwen3_next.layers.ops.tensor_types import Tensor
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.inputs import check_token_ids
from qwen3_next.models.weight_table import mtp_name
from qwen3_next.tasks.task import Task
from qwen3_next.think.token_sequences import token_sequences
from qwen3_next.training.data import pad
from qwen3_next.transfer.growth.layer_arrangement import layer_of
from qwen3_next.transfer.growth.unit_axes import network_of
from qwen3_next.transfer.named_weights import NamedWeights


class Importance(NamedTuple):
    """What is worth how much; only the order of the numbers within an array means something.

    Attributes:
        layers: `(L,)`.
        channels: `(D,)`, of the residual stream.
        networks: For every feed-forward network, by its path, `(F,)` for the units of a dense one
            and `(E,)` for the experts of a sparse one.
    """

    layers: np.ndarray
    channels: np.ndarray
    networks: dict[str, np.ndarray]


def activation_importance(model: Task, data: Any, batch_size: int) -> Importance:
    """The importance that tokens show, in float64; every kind of data that `profile_layers` takes.

    Raises:
        ValueError: no data, data of another kind, or sequences that the model cannot read.
    """
    traced = compile_with_weights(model, lambda *inputs: _trace(model, *inputs))
    sums: dict[str, np.ndarray] = {}
    longest = 0
    for batch in _batches(data, model.config, batch_size):
        longest = max(longest, int(batch[1].sum(-1).max()))
        found = traced(*(ops.convert_to_tensor(array) for array in batch))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + ops.convert_to_numpy(value).astype("float64")
    if not sums:
        raise ValueError(
            "`calibration_data` must hold at least one sequence. "
            f"Received: calibration_data={data!r}"
        )
    modules = len(getattr(model, "mtp_modules", ()))
    if longest <= modules:
        raise ValueError(
            f"`calibration_data` must hold a sequence of more than {modules} tokens, which all "
            f"MTP modules read something of. Received: at most {longest} tokens"
        )
    if not all(np.isfinite(value).all() for value in sums.values()):
        raise ValueError(
            "`model` must give finite hidden states for the calibration data. "
            "Received: a model that does not"
        )
    layers = sums.pop("layers") / sums["tokens"]
    channels = sums.pop("channels") / sums.pop("tokens")
    weights = NamedWeights(model)
    for network, energy in sums.items():
        down = f"{network}/down_proj/kernel"
        if down in weights:
            sums[network] = energy * _squares(weights[down], 0)
    return Importance(layers, channels, sums)


def weight_importance(model: Task) -> Importance:
    """The importance that the norms of weights show, in float64."""
    weights, config = NamedWeights(model), model.config
    layers, channels = np.zeros(config.num_layers), np.zeros(config.hidden_size)
    networks: dict[str, np.ndarray] = {}
    for path, row in weights.rows.items():
        if row.part == "norm" or not {"embed", "mlp"} & set(row.axes):
            continue
        array = weights[path]
        writes = path.endswith(("/o_proj/kernel", "/out_proj/kernel", "/down_proj/kernel"))
        if layer_of(path) is not None and (writes or path.endswith("/experts/down")):
            experts = len(array) if row.part == "experts" else 1
            layers[layer_of(path)] += _squares(array, 0).sum() / experts
        for axis, kind in enumerate(row.axes):
            if kind == "embed":
                shares = _squares(array, axis).reshape(-1, config.hidden_size).sum(0)
                channels += shares / max(shares.sum(), np.finfo("float64").tiny)
        for norms in _unit_norms(array, row.path):
            network = network_of(path)
            networks[network] = networks.get(network, 1.0) * norms
    return Importance(layers, channels, networks)


def _unit_norms(array: np.ndarray, path: str) -> Iterator[np.ndarray]:
    """Norms by unit of a dense network or by expert, of each of its matrices."""
    if path.endswith("/experts/gate_up"):
        yield from (np.sqrt(_squares(half, 0)) for half in np.split(array, 2, axis=-1))
    elif path.endswith("/experts/down"):
        yield np.sqrt(_squares(array, 0))
    elif "/mlp/" in path and path.endswith(("/gate_proj/kernel", "/up_proj/kernel")):
        yield np.sqrt(_squares(array, 1))
    elif "/mlp/" in path and path.endswith("/down_proj/kernel"):
        yield np.sqrt(_squares(array, 0))


def _squares(array: np.ndarray, axis: int) -> np.ndarray:
    """Sums of squares over all other axes, in float64."""
    others = tuple(other for other in range(array.ndim) if other != axis)
    return np.square(array.astype("float64")).sum(others)


def _batches(data: Any, config: Qwen3NextConfig, rows: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Token ids, their padding mask, and what of it counts: rows that fill a batch up do not."""
    group: list[np.ndarray] = []
    for sequence in token_sequences(data):
        check_token_ids(sequence, config.vocab_size)
        if len(sequence) > config.max_position_embeddings:
            raise ValueError(
                "Sequences must have at most `max_position_embeddings`="
                f"{config.max_position_embeddings} tokens. Received: {len(sequence)} tokens"
            )
        group.append(sequence)
        if len(group) == rows:
            yield _padded(group, rows, config)
            group = []
    if group:
        yield _padded(group, rows, config)


def _padded(group, rows, config):
    longest = max(map(len, group))
    # One of a few widths, so that few programs are compiled.
    width = min(bucket(longest, SMALLEST_CHUNK), config.max_position_embeddings)
    batch = pad([*group, *group[:1] * (rows - len(group))], width)
    counted = batch["padding_mask"] & (np.arange(rows) < len(group))[:, None]
    return batch["token_ids"], batch["padding_mask"], counted


def _trace(model: Any, token_ids: Tensor, mask: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens that count: of influence, of energies, of probabilities."""
    backbone, found = model.backbone, {}
    weight = ops.cast(counted, "float32")
    hidden = embedded = backbone.embed_tokens(token_ids)
    influence, channels = [], 0.0
    for number, layer in enumerate(backbone.decoder_layers):
        before = hidden
        hidden, normed, worth = _trace_layer(layer, hidden, mask, counted)
        found[f"model/layers_{number}/mlp"] = worth
        influence.append(ops.sum(weight * (1.0 - _cosine(before, hidden))))
        channels += sum(_energy(x, weight) for x in normed)
    output = backbone.norm(hidden)
    found["layers"] = ops.stack(influence)
    found["channels"] = channels + _energy(output, weight)
    found["tokens"] = ops.sum(weight)
    modules = getattr(model, "mtp_modules", ())
    before_norm = modules and model.config.mtp.hidden_state == "before_norm"
    state = hidden if before_norm else output
    for step, module in enumerate(modules, start=1):
        rest = token_ids.shape[1] - step
        if module.body is None or rest < 1:  # too short a batch shows it nothing
            break
        real, seen = mask[:, step:], counted[:, step:]
        x = module.fc(_both(module, embedded[:, step:], state[:, :rest]))
        if isinstance(module.body, DecoderLayer):
            x, _, worth = _trace_layer(module.body, x, real, seen)
        else:
            fed, worth = _trace_network(module.body, module.mlp_norm(x), seen)
            x = x + fed
        found[f"{mtp_name(step - 1)}/{_network_in(module)}"] = worth
        state = module.norm(x)
    return found


def _both(module, embedding, hidden):
    parts = [module.pre_fc_norm_embedding(embedding), module.pre_fc_norm_hidden(hidden)]
    return ops.concatenate(parts, axis=-1)


def _network_in(module):
    return "layers_0/mlp" if isinstance(module.body, DecoderLayer) else "mlp"


def _trace_layer(
    layer: DecoderLayer, x: Tensor, mask: Tensor, counted: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output of a layer, what its norms give, and what its feed-forward network is made of."""
    first = layer.input_layernorm(x)
    x = x + ops.cast(layer.mixer(first, padding_mask=mask, training=False), x.dtype)
    second = layer.post_attention_layernorm(x)
    fed, worth = _trace_network(layer.mlp, second, counted)
    return x + ops.cast(fed, x.dtype), [first, second], worth


def _trace_network(
    network: SparseMoE | SwiGLU, x: Tensor, counted: Tensor
) -> tuple[Tensor, Annotated[Tensor, "F or E"]]:
    """Output of a network, and the energy of its units or the probability of its experts."""
    if isinstance(network, SparseMoE):
        fed, routing = network(x, padding_mask=counted, return_routing=True)
        return fed, routing.probability
    gate = ACTIVATIONS[network.activation].function(network.gate_proj(x))
    units = gate * network.up_proj(x)
    return network.down_proj(units), _energy(units, ops.cast(counted, "float32"))


def _energy(
    x: Annotated[Tensor, "B T D"], weight: Annotated[Tensor, "B T"]
) -> Annotated[Tensor, "D"]:
    return ops.sum(ops.square(ops.cast(x, "float32")) * weight[..., None], axis=(0, 1))


def _cosine(
    x: Annotated[Tensor, "B T D"], y: Annotated[Tensor, "B T D"]
) -> Annotated[Tensor, "B T"]:
    x, y = ops.cast(x, "float32"), ops.cast(y, "float32")
    lengths = ops.sum(ops.square(x), axis=-1) * ops.sum(ops.square(y), axis=-1)
    return ops.sum(x * y, axis=-1) / ops.sqrt(ops.maximum(lengths, 1e-30))
