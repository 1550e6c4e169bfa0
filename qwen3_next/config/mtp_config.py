"""The configuration of multi-token prediction."""

import dataclasses
from dataclasses import dataclass

HEAD_TYPES = ("transformer", "mlp", "shared_lm_head")
HIDDEN_STATES = ("after_norm", "before_norm")


@dataclass(frozen=True)
class MTPConfig:
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
        speculation_lookahead: Tokens drafted before a verification, at most K.
        hidden_state: What the first step reads of the backbone: its output `"after_norm"`, as the
            published module does, or `"before_norm"`.
        sequential_forward: Whether training holds the logits of one chunk of one step at a time
            and computes them again for the gradient. Otherwise the logits of all steps are kept.
        warmup_steps: Training steps over which w rises from 0 to `mtp_loss_weight`.

    Raises:
        ValueError: a value out of range, or an unknown name.
    """

    num_predict_tokens: int = 4
    mtp_head_type: str = "transformer"
    share_weights_across_steps: bool = True
    loss_weight_decay: float = 0.5
    mtp_loss_weight: float = 0.5
    speculation_lookahead: int = 3
    hidden_state: str = "after_norm"
    sequential_forward: bool = True
    warmup_steps: int = 0

    def __post_init__(self):
        def integer(value, low):
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        def number(value):
            return isinstance(value, int | float) and not isinstance(value, bool)

        self._require("num_predict_tokens", "an integer of at least 1", lambda v: integer(v, 1))
        self._require("speculation_lookahead", "an integer of at least 1", lambda v: integer(v, 1))
        self._require("warmup_steps", "an integer of at least 0", lambda v: integer(v, 0))
        self._require("loss_weight_decay", "in (0, 1]", lambda v: number(v) and 0 < v <= 1)
        self._require("mtp_loss_weight", "at least 0", lambda v: number(v) and v >= 0)
        for name, known in (("mtp_head_type", HEAD_TYPES), ("hidden_state", HIDDEN_STATES)):
            self._require(name, f"one of {list(known)}", lambda v, known=known: v in known)
        for name in ("share_weights_across_steps", "sequential_forward"):
            self._require(name, "a bool", lambda v: isinstance(v, bool))
        if self.speculation_lookahead > self.num_predict_tokens:
            raise ValueError(
                "`speculation_lookahead` must be at most `num_predict_tokens`, the steps the head "
                f"learns. Received: speculation_lookahead={self.speculation_lookahead}, "
                f"num_predict_tokens={self.num_predict_tokens}"
            )

    @classmethod
    def from_dict(cls, fields):
        """Builds a configuration; an unknown key raises `ValueError` that lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"Unknown fields of `mtp`: {unknown}. Known fields: {known}")
        return cls(**fields)

    @property
    def step_weights(self):
        """The weights `a_1 .. a_K` of the steps, which add up to 1."""
        powers = [self.loss_weight_decay**k for k in range(self.num_predict_tokens)]
        return [power / sum(powers) for power in powers]

    @property
    def modules(self):
        """Number of modules: one, or one a step."""
        return 1 if self.share_weights_across_steps else self.num_predict_tokens

    def _require(self, name, what, fine):
        value = getattr(self, name)
        if not fine(value):
            raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
