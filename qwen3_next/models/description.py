"""What a model weighs, from its configuration alone."""

from dataclasses import dataclass
from typing import Any

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.models.schedule import Schedule
from qwen3_next.models.weight_rows import PARTS
from qwen3_next.models.weight_table import weight_table

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Description:
    """Sizes of a model; `print` it for a table.

    Attributes:
        name: The variant's name, or `"model"`.
        total: Number of parameters.
        active: Parameters that one token meets: all but the experts it is not routed to.
        layer_passes: Runs of decoder layers per token: the layers of a think loop count once for
            every iteration, of which there are at most as many as said here. A layer router may
            skip some and repeat others.
        parts: Maps each part of the model to `(total, active)`.
        weight_bytes: Maps a dtype policy to the bytes of the weights under it.
        cache_bytes_per_row: Maps a dtype policy to the fixed size of a sequence's DeltaNet caches.
        cache_bytes_per_token: Maps a dtype policy to what every token adds in the attention caches.

    Example:

    ```python
    from qwen3_next import describe

    sizes = describe("80b_a3b")
    assert sizes.total == 79_674_391_296
    ```
    """

    name: str
    total: int
    active: int
    layer_passes: int
    parts: dict[str, tuple[int, int]]
    weight_bytes: dict[str, int]
    cache_bytes_per_row: dict[str, int]
    cache_bytes_per_token: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.name}", "", f"{'part':<16}{'parameters':>18}{'active':>18}"]
        for part, (total, active) in self.parts.items():
            lines.append(f"{part:<16}{total:>18,}{active:>18,}")
        lines.append(f"{'total':<16}{self.total:>18,}{self.active:>18,}")
        embedding = self.parts["embedding"][1]
        lines.append(f"{'  less embedding':<16}{'':>18}{self.active - embedding:>18,}")
        lines.append(f"{'layer passes':<16}{'':>18}{self.layer_passes:>18,}")
        lines += ["", f"{'dtype':<16}{'weights':>14}{'cache / row':>16}{'cache / token':>16}"]
        for dtype, size in self.weight_bytes.items():
            row, token = self.cache_bytes_per_row[dtype], self.cache_bytes_per_token[dtype]
            sizes = map(bytes_text, (size, row, token))
            lines.append("{:<16}{:>14}{:>16}{:>16}".format(dtype, *sizes))
        return "\n".join(lines)


def describe(variant: str | Qwen3NextConfig, **overrides: Any) -> Description:
    """Counts the parameters and bytes of a model without allocating a weight.

    Args:
        variant: A variant's name or a `Qwen3NextConfig`.
        **overrides: Fields of the configuration to replace.

    Returns:
        `Description`.

    Raises:
        ValueError: an unknown variant or field, or a value out of range.

    Example:

    ```python
    from qwen3_next import describe

    assert describe("tiny", num_experts=8).total > describe("tiny").total
    ```
    """
    if isinstance(variant, Qwen3NextConfig):
        name, config = "model", variant.replace(**overrides)
    else:
        name, config = variant, Qwen3NextConfig.from_variant(variant, **overrides)
    table = weight_table(config)
    parts = {}
    for part in PARTS:
        total = sum(weight.size for weight in table if weight.part == part)
        active = total
        if part == "experts":
            active = total // max(config.num_experts, 1) * config.num_experts_per_tok
        if total:
            parts[part] = (total, active)
    islands = sum(weight.size for weight in table if weight.dtype == "float32")
    total = sum(weight.size for weight in table)
    conv, recurrent, cached = _cache_sizes(config)
    return Description(
        name=name,
        total=total,
        active=sum(active for _, active in parts.values()),
        layer_passes=sum(not one.repeat for one in Schedule.from_config(config).layer_passes()),
        parts=parts,
        weight_bytes={d: (total - islands) * b + islands * 4 for d, b in DTYPE_BYTES.items()},
        cache_bytes_per_row={d: conv * b + recurrent * 4 for d, b in DTYPE_BYTES.items()},
        cache_bytes_per_token={d: cached * b for d, b in DTYPE_BYTES.items()},
    )


def _cache_sizes(config):
    """Elements of conv tails and recurrent states per row, and of keys and values per token."""
    passes = Schedule.from_config(config).layer_passes()  # each has a cache of its own
    linear = sum(config.layer_types[one.layer] == "linear_attention" for one in passes)
    full = len(passes) - linear
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    conv = linear * (config.linear_conv_kernel_dim - 1) * (2 * keys + values)
    recurrent = linear * values * config.linear_key_head_dim
    return conv, recurrent, full * 2 * config.num_key_value_heads * config.head_dim


def bytes_text(size: float) -> str:
    """A number of bytes as a table shows it."""
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:,.1f} {unit}"
    return f"{size / 1024:,.1f} GiB"
