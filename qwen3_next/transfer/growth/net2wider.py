"""Growth in width: units are copied, and what reads them is divided by the number of copies.

    x' = (x, x)      W' = (W / 2, W / 2)      x' W' = x W

A norm over copied channels gives copied channels, since the mean square stays what it is as long as
every channel is copied equally often. Where embeddings are tied, the head reads with the table that
the copied embeddings are in: the logits would come out m times as large for m copies. The copies of
the last norm are weighted by g then, with

    sum g_i = 1                 so that the logits stay
    sum g_i^2 = m               so that their mean square stays, where MTP modules norm them again
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.validation import NOT_NEGATIVE, integer, optional_integer, require
from qwen3_next.models.weight_rows import Weight
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.growth.unit_axes import chosen, field_of, index_of
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt, require_model

HEADS = ("num_key_value_heads", "num_attention_heads")
LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
FFN_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
# Of the backbone and of MTP modules: the head reads behind them.
_LAST_NORM = re.compile(r"(model|mtp|mtp_\d+)/norm/(weight|scale)")
# Why a size must be a multiple of what it was.
MULTIPLES = {
    "hidden_size": "an RMS norm stays what it is only if all channels are copied equally often",
    **dict.fromkeys(HEADS + LINEAR_HEADS, "all groups of heads grow alike"),
    "num_experts": "the chosen experts must be chosen with all of their copies",
}


def grow_model_width(
    model: Task,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    moe_intermediate_size: int | None = None,
    shared_expert_intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    linear_num_key_heads: int | None = None,
    linear_num_value_heads: int | None = None,
    num_experts: int | None = None,
    noise_std: float = 0.0,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """A wider model that computes what a model computes.

    Units (channels of the residual stream, heads, units of feed-forward networks, experts) are
    copied; whatever reads them is divided by the number of copies. Equal up to rounding, in float32
    within 1e-5. Copies begin as equals and would stay so: `noise_std` tells apart how they are
    read, with noise that sums to 0 over the copies of a unit, so that it changes no output.

    Copied experts take their tokens along: with `num_experts` m times as large,
    `num_experts_per_tok` is m times as large, each token goes to all copies of its experts with an
    m-th of the weight, and the load-balancing loss is m times as large.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier`, also with a think loop, but without LoRA
            experts.
        hidden_size: Width of the residual stream, a multiple of the model's. `head_dim` stays.
        intermediate_size, moe_intermediate_size, shared_expert_intermediate_size: Widths of the
            feed-forward networks, at least the model's; the units to copy are drawn.
        num_attention_heads, num_key_value_heads, linear_num_key_heads, linear_num_value_heads:
            Heads, multiples of the model's. Every query head keeps its key head, or a copy of it.
        num_experts: Experts of an MoE layer, a multiple of the model's.
        noise_std: Standard deviation of the noise, relative to that of each weight.
        seed: Seed of noise and drawn units. `None` for another one every time.
        name: Name of the new model, `None` for Keras' choice.

    Sizes that are `None` stay as they are.

    Returns:
        A model of the same class.

    Raises:
        ValueError: nothing to grow, a size that is smaller, no multiple where it must be one, or
            of something that the model does not have.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.net2wider import grow_model_width

    model = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=2, num_experts=0, intermediate_size=48
    )
    wider = grow_model_width(model, hidden_size=64, intermediate_size=80, noise_std=0.1)
    token_ids = np.array([[1, 2, 3]])
    assert np.abs(np.subtract(wider(token_ids), model(token_ids))).max() < 1e-5
    ```

    Reference: Net2Net, arXiv 1511.05641, section 2.2; bert2BERT, arXiv 2110.07143.
    """
    require_model("model", model)
    require(NOT_NEGATIVE, "noise_std", noise_std)
    require(optional_integer(0), "seed", seed)
    given = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "moe_intermediate_size": moe_intermediate_size,
        "shared_expert_intermediate_size": shared_expert_intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "linear_num_key_heads": linear_num_key_heads,
        "linear_num_value_heads": linear_num_value_heads,
        "num_experts": num_experts,
    }
    weights = NamedWeights(model)
    sizes = {field: size for field, size in given.items() if size is not None}
    config = _wider_config(model.config, weights.rows, sizes)
    widening = _Widening(model, config, noise_std, np.random.default_rng(seed))
    return rebuilt(
        model, config, lambda row: widening.weight(weights[row.path], weights.rows[row.path]), name
    )


def _wider_config(
    config: Qwen3NextConfig, rows: Mapping[str, Weight], sizes: dict[str, int]
) -> Qwen3NextConfig:
    """The configuration with the sizes, once they are checked."""
    if not sizes:
        raise ValueError("Give at least one size to grow to. Received: none")
    if config.etd is not None and config.etd.use_lora_experts:
        raise ValueError(
            "`model` must have no LoRA experts: merge one with `merge_lora_expert` first. "
            f"Received: etd={config.etd}"
        )
    there = {field_of(row, axis) for row in rows.values() for axis in range(len(row.axes))}
    for field, size in sizes.items():
        now = getattr(config, field)
        if field not in there:
            raise ValueError(
                f"`{field}` must be None: the model has no weights of that size. "
                f"Received: {field}={size}"
            )
        require(integer(now), field, size)
        if field in MULTIPLES and size % now:
            raise ValueError(
                f"`{field}` must be a multiple of {now}, the model's: {MULTIPLES[field]}. "
                f"Received: {field}={size}"
            )
    changes = dict(sizes)
    if "num_experts" in sizes:
        times = sizes["num_experts"] // config.num_experts
        changes["num_experts_per_tok"] = times * config.num_experts_per_tok
    return config.replace(**changes)


class _Shares(NamedTuple):
    """How the copies of a channel are written by the last norms and read by MTP modules.

    Attributes:
        written: `(m,)`, factors of the copies where embeddings are tied.
        read: `(m,)`, factors for what reads copies that are equal or so written.
    """

    written: np.ndarray
    read: np.ndarray


class _Widening:
    """From the weights of a model to those of a wider one."""

    def __init__(
        self, model: Task, config: Qwen3NextConfig, noise: float, rng: np.random.Generator
    ) -> None:
        self.old, self.new = model.config, config
        self.noise, self.rng = noise, rng
        self.drawn: dict[tuple[str, str], np.ndarray] = {}
        # A classifier has a head of its own.
        self.is_tied = config.tie_word_embeddings and not hasattr(model, "num_labels")
        copies = config.hidden_size // model.config.hidden_size
        self.shares = _shares(copies, with_mtp=config.mtp is not None)

    def weight(self, array: np.ndarray, row: Weight) -> np.ndarray:
        """The weight of the wider model."""
        array = array.astype("float32")
        read = _read_axes(row)
        for axis in read:
            index = index_of(array, row, axis, self.old, self.units_of)
            array = array if index is None else self._divided(array, row, axis, index)
        others = tuple("" if axis in read else kind for axis, kind in enumerate(row.axes))
        array = chosen(array, row._replace(axes=others), self.old, self.units_of)
        if self.is_tied and _LAST_NORM.fullmatch(row.path):
            one = self.old.normalization_type == "zero_centered_rms_norm"  # beside the weight
            array = (array + one) * np.repeat(self.shares.written, self.old.hidden_size) - one
        return array

    def units_of(self, field: str, network: str) -> np.ndarray | None:
        """For every unit of the new model the one that it is a copy of."""
        for pair in (HEADS, LINEAR_HEADS):
            if field in pair:
                sizes = [(getattr(self.old, name), getattr(self.new, name)) for name in pair]
                return _heads(*sizes)[pair.index(field)]
        old, new = getattr(self.old, field), getattr(self.new, field)
        if old == new:
            return None
        if field not in FFN_WIDTHS:
            return np.arange(new) % old
        if (field, network) not in self.drawn:
            more = self.rng.integers(0, old, new - old)
            self.drawn[field, network] = np.concatenate([np.arange(old), more])
        return self.drawn[field, network]

    def _divided(self, array: np.ndarray, row: Weight, axis: int, index: np.ndarray) -> np.ndarray:
        """The weight for an input whose units are copies, `index` says of which."""
        share, noise = (1.0 / np.bincount(index))[index], self.noise * array.std()
        if row.axes[axis] == "experts":
            share = np.ones_like(share)  # the router divides their weights
        elif self.is_tied and row.path.endswith("/fc/kernel"):
            # Of the two halves, the second reads what a last norm wrote: copies that differ.
            share[len(share) // 2 :] = np.repeat(self.shares.read, self.old.hidden_size)
            noise = 0.0
        array = np.moveaxis(array, axis, 0)
        share = share.reshape(-1, *[1] * (array.ndim - 1)).astype("float32")
        array = array[index]
        if noise:
            array += noise * _balanced_noise(self.rng, index, array.shape)
        return np.moveaxis(share * array, 0, axis)


def _read_axes(row: Weight) -> tuple[int, ...]:
    """The axes of a weight that are summed over."""
    if row.path.endswith("/experts/gate_up"):
        return (1,)
    if row.path.endswith("/experts/down"):
        return (0, 1)
    return (0,) if row.path.endswith("/kernel") else ()


def _balanced_noise(
    rng: np.random.Generator, index: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Normal noise that sums to 0 over the copies of each unit."""
    noise = rng.standard_normal(shape, "float32")
    sums = np.zeros((index.max() + 1, *shape[1:]), "float32")
    np.add.at(sums, index, noise)
    counts = np.bincount(index).reshape(-1, *[1] * (len(shape) - 1))
    return noise - (sums / counts.astype("float32"))[index]


def _heads(groups: tuple[int, int], heads: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which group and which head the new ones are copies of.

    Args:
        groups: Key heads of the old and the new model.
        heads: Heads that they serve, query or value heads; head h has key head `h // (H // G)`.
    """
    repeats, per_group = heads[0] // groups[0], heads[1] // groups[0]
    within = np.arange(per_group) % repeats
    head = np.arange(groups[0])[:, None] * repeats + within  # (G, H' / G)
    return np.repeat(np.arange(groups[0]), groups[1] // groups[0]), head.reshape(-1)


def _shares(copies: int, with_mtp: bool) -> _Shares:
    """Factors g with sum 1, with MTP modules also sum of squares m; and how those copies are read.

    What the first module reads may come from before the last norm, where copies are equal: d with
    sum d_i = 1 and sum d_i g_i = 1 reads both.
    """
    m = copies
    written = np.full(m, 1.0 / m)
    if with_mtp:
        written = np.full(m, (1.0 - np.sqrt(m + 1.0)) / m)
        written[0] = 1.0 - written[1:].sum()
    return _Shares(written, (1.0 + written) / (m + 1.0))
