"""The rows of the weight table and how the usual ones are written."""

from typing import NamedTuple

import numpy as np

from qwen3_next.models.weight_layouts import (
    SAME,
    SWAP,
    Layout,
    from_heads_layout,
    to_heads_layout,
)

PARTS = (
    "embedding",
    "deltanet",
    "attention",
    "router",
    "experts",
    "shared_expert",
    "mlp",
    "norm",
    "head",
    "think",
    "mtp",
)
AXES = (
    "vocab",  # V
    "embed",  # D, the residual stream
    "heads",  # H, query heads
    "kv_heads",  # G, key and value heads
    "head_dim",
    "linear_key_heads",  # of a DeltaNet, with everything that belongs to a key head behind it
    "linear_value_heads",
    "linear_head_dim",
    "taps",
    "experts",  # E
    "scores",  # E, of a router: one for each expert, and never split with the experts
    "expert_mlp",  # F
    "mlp",
    "labels",
    "router_hidden",
    "actions",
    "lora_experts",  # N
    "lora_rank",
    "lora_in",  # of a projection, all its dims in one
    "lora_out",
    "one",
)


class Fused(NamedTuple):
    """The one tensor that some checkpoints hold instead of one per expert.

    Attributes:
        tensor: Its published name.
        shape: Its shape.
        layout: How it makes up the variable.
    """

    tensor: str
    shape: tuple[int, ...]
    layout: Layout


class Weight(NamedTuple):
    """One variable.

    Attributes:
        path: Where it is, relative to the model.
        shape: Shape of the variable.
        axes: Logical axis, one of `AXES`, for each of its dims.
        part: What it is counted as, one of `PARTS`.
        tensors: Names of the published tensors it is made of.
        tensor_shape: Shape of each of them.
        layout: How they make up the variable.
        fused: The one tensor that may stand for all of them, or `None`.
        dtype: `"float32"` for what is float32 under every dtype policy, else `None`.
        optional: Whether a checkpoint may lack it; it then keeps its initial values.
        zeros: Whether those are zeros.
        tied: Names of tensors that a checkpoint may hold as well, with the same values.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    part: str
    tensors: tuple[str, ...]
    tensor_shape: tuple[int, ...]
    layout: Layout
    fused: Fused | None = None
    dtype: str | None = None
    optional: bool = False
    tied: tuple[str, ...] = ()
    zeros: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def published_name(path):
    """The published name of what stands at a path."""
    return path.replace("/layers_", "/layers/").replace("/", ".")


def plain_row(path, shape, axes, part):
    """A weight that is published as it stands, called `weight` there."""
    tensors = (published_name(path.rsplit("/", 1)[0]) + ".weight",)
    return Weight(path, shape, axes, part, tensors, shape, SAME)


def biased_rows(path, shape, axes):
    """Kernel and bias of a part of a think loop."""
    bias = plain_row(f"{path}/bias", shape[1:], axes[1:], "think")
    bias = bias._replace(tensors=(published_name(f"{path}/bias"),), zeros=True)
    return [dense_row(path, shape, axes, "think"), bias]


def bare_row(path, shape, axes, part):
    """A float32 weight that is published as it stands and under its own name."""
    return Weight(path, shape, axes, part, (published_name(path),), shape, SAME, dtype="float32")


def norm_row(config, path, width, axis="embed"):
    """The weight of a norm."""
    # Keras' own RMS norm calls its weight `scale`.
    leaf = "weight" if config.normalization_type == "zero_centered_rms_norm" else "scale"
    return plain_row(f"{path}/{leaf}", (width,), (axis,), "norm")


def dense_row(path, shape, axes, part):
    """The kernel of a dense layer."""
    tensors = (published_name(path) + ".weight",)
    return Weight(f"{path}/kernel", shape, axes, part, tensors, shape[::-1], SWAP)


def to_heads_row(path, width, heads, dim, axes, part):
    """The kernel of a projection to heads."""
    return Weight(
        f"{path}/kernel",
        (width, heads, dim),
        ("embed", *axes),
        part,
        (published_name(path) + ".weight",),
        (heads * dim, width),
        to_heads_layout(width, heads, dim),
    )


def from_heads_row(path, heads, dim, width, axes, part):
    """The kernel of a projection from heads."""
    return Weight(
        f"{path}/kernel",
        (heads, dim, width),
        (*axes, "embed"),
        part,
        (published_name(path) + ".weight",),
        (width, heads * dim),
        from_heads_layout(heads, dim, width),
    )
