"""Rows of the weight table for variables that are known by their path alone.

A path is taken for a pattern: numbers stand for any number (`layers_3` for every layer), and
anything may stand in front (a model inside of another). The longest pattern counts, so that
`norm/weight`, the last norm's, is not that of `layers_0/linear_attn/norm/weight`.
"""

import functools
import itertools
import re
from collections.abc import Iterable

from qwen3_next.config import ETDConfig, LoRAExpertConfig, MTPConfig, Qwen3NextConfig
from qwen3_next.config.lora_expert_config import PROJECTIONS
from qwen3_next.config.mtp_config import HEAD_TYPES
from qwen3_next.models.weight_rows import Weight
from qwen3_next.models.weight_table import weight_table

NORMS = ("zero_centered_rms_norm", "rms_norm")
# What stands here belongs to a backbone, which may go by another name.
BACKBONE = "model/"


def patterns_of(rows: Iterable[Weight]) -> dict[str, Weight]:
    """Maps regular expressions for whole paths, of which one at most matches a path, to rows."""
    found: dict[str, Weight] = {}
    for row in rows:
        found.setdefault(_template(row.path.removeprefix(BACKBONE)), row)
    patterns = {}
    for template, row in found.items():
        longer = [other for other in found if other.endswith(f"/{template}")]
        guard = rf"(?!(?:.*/)?(?:{'|'.join(longer)})\Z)" if longer else ""
        patterns[f"{guard}(?:.*/)?{template}"] = row
    return patterns


def row_at(path: str, rank: int) -> Weight | None:
    """The row for a variable of any model of the family, or `None` for one that has none."""
    for pattern, row in _family():
        if len(row.axes) == rank and pattern.fullmatch(path):
            return row
    return None


@functools.cache
def _family():
    """Compiled patterns for everything that a model may have."""
    rows = [row for config in _every_kind() for row in weight_table(config)]
    rows += weight_table(next(_every_kind()), num_labels=2)
    return [(re.compile(pattern), row) for pattern, row in patterns_of(rows).items()]


def _every_kind():
    """Small configurations that have every weight between them."""
    loop = ETDConfig(
        0,
        3,
        0,
        adaptive_depth=True,
        input_injection=True,
        use_layer_router=True,
        use_lora_experts=True,
        lora_expert=LoRAExpertConfig(target_modules=PROJECTIONS),
    )
    for norm, head in itertools.product(NORMS, HEAD_TYPES):
        yield Qwen3NextConfig(
            num_layers=3,
            layer_types=("linear_attention", "full_attention", "full_attention"),
            mlp_only_layers=(2,),
            normalization_type=norm,
            attention_gate_bias=0.0,
            etd=loop,
            mtp=MTPConfig(2, head, share_weights_across_steps=False, speculation_lookahead=2),
        )


def _template(path):
    return re.sub(r"(?<=_)\d+(?=[_/])", r"\\d+", re.escape(path))
