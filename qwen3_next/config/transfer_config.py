"""What goes from a Qwen3 into a hybrid, and how the hybrid learns from it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from qwen3_next.config.hybrid_attention_config import HybridAttentionConfig
from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    POSITIVE,
    Config,
    Rule,
    integer,
    number,
    one_of,
)

# A gate of bias 8 lets 0.99966 of its input through.
OPEN_GATE_BIAS = 8.0


@dataclass(frozen=True)
class CrossArchTransferConfig(Config):
    """Conversion of a Qwen3 or Qwen3-MoE into a hybrid, and distillation of the result.

    Args:
        source_model: A directory or `"hf://owner/name"`, for calls that name no source.
        hybrid_attention: `HybridAttentionConfig` (or its fields as a dict).
        copy_attention_weights: Whether mixers are made from the source's; otherwise they are those
            of a new model.
        copy_ffn_weights: Likewise of the feed-forward networks, with router and experts.
        copy_norm_weights: Likewise of the norms of the residual stream.
        copy_embedding_weights: Likewise of the embedding and the head.
        gate_init_strategy: The output gate of the layers that stay attention, which the source has
            not. `"zero"`: its weights are 0, so that it is sigmoid(bias) everywhere, and the output
            projection is divided by that: exact. `"small"`: as `"zero"` with weights drawn from
            N(0, 0.01^2), so that heads differ from the start. `"ones"`: its weights are 0 and it
            stands open by its bias b, with the output projection as it is: each layer's attention
            is too small by the factor sigmoid(b), 0.99966 at b = 8. Needs `gate_bias`.
        num_experts: Experts that every dense feed-forward network is copied into (sparse
            upcycling), 0 for none.
        num_experts_per_tok: Experts per token then.
        expert_init_noise: Noise of the copies, relative to the spread of a weight; at 0 the
            function is that of the dense network.
        use_distillation: Whether the teacher takes part in training; without it the loss is the
            cross-entropy alone.
        distillation_temperature: tau of both softmaxes.
        distillation_alpha: alpha of `alpha * KD + (1 - alpha) * CE`.
        seed: Of what is drawn.

    Raises:
        ValueError: a value out of range, or two that contradict each other.

    Example:

    ```python
    from qwen3_next import CrossArchTransferConfig

    config = CrossArchTransferConfig(hybrid_attention={"half_life": 128.0}, distillation_alpha=0.9)
    assert config.hybrid_attention.half_life == 128
    ```
    """

    source_model: str | None = None
    hybrid_attention: HybridAttentionConfig = field(default_factory=HybridAttentionConfig)
    copy_attention_weights: bool = True
    copy_ffn_weights: bool = True
    copy_norm_weights: bool = True
    copy_embedding_weights: bool = True
    gate_init_strategy: str = "zero"
    num_experts: int = 0
    num_experts_per_tok: int = 2
    expert_init_noise: float = 0.0
    use_distillation: bool = True
    distillation_temperature: float = 2.0
    distillation_alpha: float = 0.5
    seed: int = 0

    RULES: ClassVar[dict[str, Rule]] = {
        "source_model": Rule(
            "None, a directory or a name", lambda v: v is None or (isinstance(v, str) and v != "")
        ),
        "hybrid_attention": Rule(
            "a HybridAttentionConfig or a dict of its fields",
            lambda v: isinstance(v, HybridAttentionConfig),
        ),
        "copy_attention_weights": BOOLEAN,
        "copy_ffn_weights": BOOLEAN,
        "copy_norm_weights": BOOLEAN,
        "copy_embedding_weights": BOOLEAN,
        "gate_init_strategy": one_of(("zero", "small", "ones")),
        "num_experts": integer(0),
        "num_experts_per_tok": integer(1),
        "expert_init_noise": NOT_NEGATIVE,
        "use_distillation": BOOLEAN,
        "distillation_temperature": POSITIVE,
        "distillation_alpha": number("in [0, 1]", lambda v: 0 <= v <= 1),
        "seed": integer(0),
    }

    def __post_init__(self) -> None:
        if isinstance(self.hybrid_attention, dict):
            fields: dict[str, Any] = self.hybrid_attention
            object.__setattr__(self, "hybrid_attention", HybridAttentionConfig.from_dict(fields))
        self.check_fields()
        if self.gate_init_strategy == "ones" and not self.hybrid_attention.gate_bias:
            raise ValueError(
                "`gate_init_strategy='ones'` needs `gate_bias=True` in `hybrid_attention`: a gate "
                "without a bias cannot stand open. Received: gate_bias=False"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                "`num_experts_per_tok` must be at most `num_experts`. Received: "
                f"num_experts_per_tok={self.num_experts_per_tok}, num_experts={self.num_experts}"
            )

    @property
    def gate_bias_value(self) -> float | None:
        """Initial bias of the output gate, or `None` for a gate without one."""
        hybrid = self.hybrid_attention
        if not hybrid.gate_bias:
            return None
        if hybrid.gate_init_value is not None:
            return float(hybrid.gate_init_value)
        return OPEN_GATE_BIAS if self.gate_init_strategy == "ones" else 0.0
