"""The configuration of LoRA experts (MoDr)."""

from dataclasses import dataclass
from typing import ClassVar

from qwen3_next.config.validation import (
    BOOLEAN,
    DROPOUT_RATE,
    NOT_NEGATIVE,
    POSITIVE,
    Config,
    Rule,
    integer,
    is_list_of,
    one_of,
)

BLOCK_OUTPUT = "block_output"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DELTANET_PROJECTIONS = ("in_proj_qkvz", "in_proj_ba", "out_proj")
# `in_proj_ba` makes write strengths and decays: it is adapted where it is asked for.
DEFAULT_PROJECTIONS = (*ATTENTION_PROJECTIONS, "in_proj_qkvz", "out_proj")
PROJECTIONS = (*ATTENTION_PROJECTIONS, *DELTANET_PROJECTIONS, BLOCK_OUTPUT)
GRANULARITIES = ("token", "sequence")


@dataclass(frozen=True)
class LoRAExpertConfig(Config):
    """What the experts of the think layers are, and how one of them is chosen.

    An expert is a low-rank change `W + (alpha / rank) A B` of projections of the think layers. A
    router picks one per row from the prompt, in every iteration; the choice holds for the whole
    sequence.

    Args:
        rank: Rank of a change.
        alpha: Its scale, times the rank.
        dropout: Dropout rate on the input of a change in training.
        target_modules: The projections, of `q_proj`, `k_proj`, `v_proj`, `o_proj` (attention),
            `in_proj_qkvz`, `in_proj_ba`, `out_proj` (DeltaNet), and `block_output`, a change of
            what a layer returns. `None` for all of the two mixers but `in_proj_ba`.
        granularity: Who picks: the row, once, from its `"sequence"`'s prompt, or every `"token"`
            for itself.
        reselect: Whether each iteration picks anew, from the think state it begins with; otherwise
            the choice of the first iteration serves all, as in the paper.
        bias_update_rate: Step by which the selection bias of an expert moves after every training
            step, up where it was chosen too rarely and down where too often; that of a router with
            `trainable=False` stays as it is.

    Raises:
        ValueError: a value out of range, or an unknown name.

    Reference: LoRA, arXiv 2106.09685; MoDr, Mixture-of-Depth-Recurrent Transformers (ICLR 2026);
    auxiliary-loss-free load balancing, arXiv 2408.15664.

    Example:

    ```python
    from qwen3_next import ETDConfig, LoRAExpertConfig

    expert = LoRAExpertConfig(rank=8, alpha=16.0)
    etd = ETDConfig(1, 2, 1, use_lora_experts=True, num_lora_experts=2, lora_expert=expert)
    assert etd.lora_expert.rank == 8
    ```
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    granularity: str = "sequence"
    reselect: bool = True
    bias_update_rate: float = 0.001

    RULES: ClassVar[dict[str, Rule]] = {
        "rank": integer(1),
        "alpha": POSITIVE,
        "dropout": DROPOUT_RATE,
        "target_modules": Rule(
            f"None or a list without repetitions of {list(PROJECTIONS)}",
            lambda value: (
                value is None
                or (is_list_of(value, one_of(PROJECTIONS).fits) and 0 < len(value) == len({*value}))
            ),
        ),
        "granularity": one_of(GRANULARITIES),
        "reselect": BOOLEAN,
        "bias_update_rate": NOT_NEGATIVE,
    }

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):  # as JSON has it
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        self.check_fields()

    def targets_of(self, projections: tuple[str, ...]) -> tuple[str, ...]:
        """Which of a layer's projections are adapted; `block_output` comes last."""
        wanted = DEFAULT_PROJECTIONS if self.target_modules is None else self.target_modules
        return tuple(name for name in (*projections, BLOCK_OUTPUT) if name in wanted)
