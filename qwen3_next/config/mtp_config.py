"""The configuration of multi-token prediction (MTP)."""

from dataclasses import dataclass
from typing import ClassVar

from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    Config,
    Rule,
    integer,
    number,
    one_of,
    optional_integer,
    require,
)

HEAD_TYPES = ("transformer", "mlp", "shared_lm_head")
HIDDEN_STATES = ("after_norm", "before_norm")
LOOKAHEAD = 3
# Above this vocabulary the product of a draft with the whole head costs more than it gives.
LARGE_VOCABULARY, DRAFT_VOCABULARY = 32768, 8192


@dataclass(frozen=True)
class MTPConfig(Config):
    """How many tokens ahead a model learns to predict, and with what.

    Args:
        num_predict_tokens: Steps K of the head: step k predicts the token k + 1 places ahead.
        mtp_head_type: What a step is made of. `"transformer"`, the published module: projection,
            one full-attention decoder layer, norm. `"mlp"`: projection, a gated feed-forward
            network with a residual, norm. `"shared_lm_head"`: projection and norm alone. All of
            them share the embedding and the language-model head.
        share_weights_across_steps: Whether one module runs K times on its own output; otherwise
            every step has a module of its own.
        loss_weight_decay: Factor b of the step weights `a_k = b^(k-1) / sum_j b^(j-1)`.
        mtp_loss_weight: Factor w of the weighted sum in the training loss.
        speculation_lookahead: Tokens drafted before a verification, at most K. Defaults to 3, or to
            K where that is less.
        hidden_state: What the first step reads of the backbone: its output `"after_norm"`, as the
            published module does, or `"before_norm"`.
        sequential_forward: Whether training holds the logits of one chunk of one step at a time
            and computes them again for the gradient. Otherwise the logits of all steps are kept.
        warmup_steps: Training steps over which w rises from 0 to `mtp_loss_weight`.
        draft_vocab_size: Most frequent tokens that are drafted from, of those the modules learned
            in `fit`; 0 for all tokens. `None` for 8,192 of a vocabulary above 32,768, otherwise
            all. Any token may be generated in any case.

    Raises:
        ValueError: a value out of range, or an unknown name.

    Example:

    ```python
    from qwen3_next import MTPConfig

    config = MTPConfig(num_predict_tokens=2)
    assert config.step_weights == [2 / 3, 1 / 3]
    assert config.speculation_lookahead == 2
    ```
    """

    num_predict_tokens: int = 4
    mtp_head_type: str = "transformer"
    share_weights_across_steps: bool = True
    loss_weight_decay: float = 0.5
    mtp_loss_weight: float = 0.5
    speculation_lookahead: int = None  # type: ignore[assignment]  # until K is known
    hidden_state: str = "after_norm"
    sequential_forward: bool = True
    warmup_steps: int = 0
    draft_vocab_size: int | None = None

    RULES: ClassVar[dict[str, Rule]] = {
        "num_predict_tokens": integer(1),
        "mtp_head_type": one_of(HEAD_TYPES),
        "share_weights_across_steps": BOOLEAN,
        "loss_weight_decay": number("in (0, 1]", lambda value: 0 < value <= 1),
        "mtp_loss_weight": NOT_NEGATIVE,
        "speculation_lookahead": integer(1),
        "hidden_state": one_of(HIDDEN_STATES),
        "sequential_forward": BOOLEAN,
        "warmup_steps": integer(0),
        "draft_vocab_size": optional_integer(0),
    }

    def __post_init__(self) -> None:
        require(self.RULES["num_predict_tokens"], "num_predict_tokens", self.num_predict_tokens)
        if self.speculation_lookahead is None:
            lookahead = min(LOOKAHEAD, self.num_predict_tokens)
            object.__setattr__(self, "speculation_lookahead", lookahead)
        self.check_fields()
        if self.speculation_lookahead > self.num_predict_tokens:
            raise ValueError(
                "`speculation_lookahead` must be at most `num_predict_tokens`, the steps the head "
                f"learns. Received: speculation_lookahead={self.speculation_lookahead}, "
                f"num_predict_tokens={self.num_predict_tokens}"
            )

    @property
    def step_weights(self) -> list[float]:
        """The weights `a_1 .. a_K` of the steps, which add up to 1."""
        powers = [self.loss_weight_decay**k for k in range(self.num_predict_tokens)]
        return [power / sum(powers) for power in powers]

    def draft_vocab_size_of(self, vocab_size: int) -> int:
        """Most frequent tokens of a vocabulary that are drafted from, 0 for all."""
        if self.draft_vocab_size is not None:
            return self.draft_vocab_size
        return DRAFT_VOCABULARY if vocab_size > LARGE_VOCABULARY else 0

    @property
    def num_modules(self) -> int:
        """Number of modules: one, or one per step."""
        return 1 if self.share_weights_across_steps else self.num_predict_tokens
