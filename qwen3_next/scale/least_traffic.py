"""The least that a training step must send over a mesh, from the weight table alone.

Of n devices that share something of s bytes, one receives at least

    (n - 1) / n s      to have all of it, or to have the sum of its own part
    2 (n - 1) / n s    to have the sum of all of it

What has to be shared, for a device that has N tokens of its own and N_g with those of the devices
along the expert axis:

    gradients    of every weight, along the axes of the rows that do not split it: summed
    FSDP         such a weight is gathered, its gradient scattered: the same bytes, once more if
                 the backward pass may not keep it; but of the embedding the rows of the tokens
                 alone, (N, D), and their gradients
    experts      tokens (N_g, D) to the experts and back, forward and backward, per MoE layer
    tensor       what a mixer and a feed-forward network give, forward, and the gradient of what
                 they read, backward: (N, D) summed; the rows of the embedding; the gradient of the
                 hidden states in the loss
"""

import math
from collections.abc import Mapping

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.description import DTYPE_BYTES
from qwen3_next.models.weight_table import weight_table
from qwen3_next.scale.sharding_rules import sharding_of


def least_traffic(
    config: Qwen3NextConfig,
    sizes: Mapping[str, int],
    tokens: int,
    dtype: str = "float32",
    fsdp: bool = False,
) -> dict[str, float]:
    """Bytes that a device receives at least in a training step, by what they are.

    Args:
        config: The model's configuration, without multi-token prediction and think loop.
        sizes: The size of every axis of the mesh.
        tokens: Tokens of the batch, which must be spread over `data` and `expert`.
        dtype: Dtype of weights and activations.
        fsdp: As for `distribute`.
    """
    item, (data, expert, tensor) = DTYPE_BYTES[dtype], sizes.values()
    own = tokens / (data * expert) * config.hidden_size * item
    moe = sum(config.is_moe(index) for index in range(config.num_layers))
    # Mixer and feed-forward network of every layer, forward and backward; embedding and loss.
    sums = 4 * config.num_layers + 2
    found = {
        "gradients": sum(_of_gradient(w, sizes, item, fsdp, own) for w in weight_table(config)),
        "experts": moe * 4 * own * (expert - 1),
        "tensor": sums * 2 * own * (tensor - 1) / tensor,
    }
    return {name: size for name, size in found.items() if size}


def _of_gradient(weight, sizes, item, fsdp, own):
    sharding = sharding_of(weight, dict(sizes), fsdp)
    held = weight.size * item / sharding.parts(dict(sizes))
    split = {name for names in sharding.axes for name in _names(names)}
    # Along the expert axis an expert has been sent the tokens of all.
    rows = ("data",) if "experts" in weight.axes else ("data", "expert")
    parts = math.prod(sizes[axis] for axis in rows if axis in split)
    copies = math.prod(sizes[axis] for axis in rows if axis not in split)
    gathered = 2 * held * (parts - 1)
    if weight.part == "embedding":
        gathered = min(gathered, 2 * own * (parts - 1) / parts)
    return gathered + 2 * held * (copies - 1) / copies


def _names(names):
    return (names,) if isinstance(names, str) else names or ()
