"""The units that the axes of a weight are made of, and the weight of a choice of units.

A choice says for every unit of a new model (a channel of the residual stream, a head, a unit of a
feed-forward network, an expert) which unit of the old one it is. It may name a unit several times,
which makes a model wider, or leave units out.
"""

from collections.abc import Callable

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.weight_rows import Weight

# From a field of the configuration and the feed-forward network that a weight belongs to, if to
# any, to the units of the old model; `None` for all as they are.
Choice = Callable[[str, str], np.ndarray | None]

_FIELDS = {
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "experts": "num_experts",
    "scores": "num_experts",
    "expert_mlp": "moe_intermediate_size",
    "mlp": "intermediate_size",
}


def field_of(row: Weight, axis: int) -> str | None:
    """The field that says how many units an axis has, `None` for an axis that has none."""
    field = _FIELDS.get(row.axes[axis])
    if field == "intermediate_size" and "/shared_expert/" in row.path:
        return "shared_expert_intermediate_size"
    return field


def network_of(path: str) -> str:
    """The feed-forward network that a weight belongs to, up to `mlp` or `shared_expert`."""
    base, found, leaf = path.partition("/mlp/")
    if not found:
        return ""
    return f"{base}/mlp/shared_expert" if leaf.startswith("shared_expert/") else f"{base}/mlp"


def index_of(
    array: np.ndarray, row: Weight, axis: int, config: Qwen3NextConfig, choice: Choice
) -> np.ndarray | None:
    """For every place on an axis of the new weight its place in the old one, `None` for all.

    An axis may hold its units twice: gate and up of experts, embedding and hidden state in MTP.

    Args:
        array: The weight of the old model.
        row: Its row in the weight table.
        axis: The axis.
        config: Configuration of the old model.
        choice: Units of the new model.
    """
    field = field_of(row, axis)
    units = None if field is None else choice(field, network_of(row.path))
    if field is None or units is None:
        return None
    size = getattr(config, field)
    return np.concatenate([units + start for start in range(0, array.shape[axis], size)])


def with_linear_heads(
    array: np.ndarray, row: Weight, config: Qwen3NextConfig, choice: Choice
) -> np.ndarray:
    """A weight of a Gated DeltaNet that is laid out by key head, with the chosen heads.

    A key head's channels are its own (query and key), then blocks of one part per value head.

    Args:
        array: `(..., G, C)`.
        row, config, choice: As for `index_of`.
    """
    keys = choice("linear_num_key_heads", "")
    values = choice("linear_num_value_heads", "")
    if "linear_key_heads" not in row.axes or keys is None or values is None:
        return array
    gates = "/in_proj_ba/" in row.path
    own = 0 if gates else 2 * config.linear_key_head_dim
    part = 1 if gates else config.linear_value_head_dim
    heads = config.linear_num_value_heads
    *rest, groups, channels = array.shape
    cells = np.arange(groups * channels).reshape(groups, channels)
    parts = [cells[keys, :own]]
    blocks = groups * (channels - own) // (heads * part)
    for block in np.split(cells[:, own:], blocks, axis=1):  # (G, H / G * part)
        parts.append(block.reshape(heads, part)[values].reshape(len(keys), -1))
    places = np.concatenate(parts, axis=1)  # (G', C')
    return np.take(array.reshape(*rest, groups * channels), places, axis=-1)


def chosen(array: np.ndarray, row: Weight, config: Qwen3NextConfig, choice: Choice) -> np.ndarray:
    """The weight with the chosen units on all of its axes, nothing else changed."""
    array = with_linear_heads(array, row, config, choice)
    for axis in range(len(row.axes)):
        if row.axes[axis] == "linear_key_heads":  # done
            continue
        index = index_of(array, row, axis, config, choice)
        array = array if index is None else np.take(array, index, axis=axis)
    return array
