"""The configuration of the Encode-Think-Decode loop (ETD)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from qwen3_next.config.layer_router_config import LayerRouterConfig
from qwen3_next.config.lora_expert_config import GRANULARITIES, LoRAExpertConfig
from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    Config,
    Rule,
    integer,
    is_list_of,
    number,
    one_of,
    optional_integer,
    require,
    shown,
)

# What `fit`, `evaluate` and `generate` tell of a think loop, as means over tokens.
THINKING_NAMES = ("think_iterations", "early_exit", "exit_confidence")
STATES = ("mean", "final")
FRACTION = number("in [0, 1]", lambda value: 0 <= value <= 1)


LAYER_ROUTER, LORA_EXPERT = LayerRouterConfig(), LoRAExpertConfig()
# What is read only where a flag says so.
USED_WITH = {
    "use_layer_router": ("layer_router", "router_warmup_steps"),
    "use_lora_experts": ("num_lora_experts", "lora_expert", "expert_warmup_steps"),
}


def _nested(kind: type[Config]) -> Rule:
    return Rule(f"a {kind.__name__} or a dict of its fields", lambda value: isinstance(value, kind))


class Split(Protocol):
    """Where a profile cuts a model, as `ETDConfig.from_profile` reads it."""

    @property
    def split(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class ETDConfig(Config):
    """Which layers think, how often, and who decides.

    The first layers of a model encode and run once, the next ones think and run k times on their
    own output, the last ones decode and run once. All iterations share one set of weights, and
    one iteration is the model without a loop.

    Args:
        n_encoder_layers: Layers before the loop.
        n_think_layers: Layers in the loop.
        n_decoder_layers: Layers behind it.
        max_think_iterations: Iterations k of the loop, and the most that a call may ask for.
        adaptive_depth: Whether every token may leave the loop earlier: after the iteration in which
            the sum of its halting probabilities reaches `confidence_threshold`, at the latest after
            the last one (Adaptive Computation Time, arXiv 1603.08983).
        confidence_threshold: That sum.
        granularity: Whose probability counts: that of the `"token"` itself, or the mean over its
            `"sequence"` up to it.
        inference_state: What the decoder layers read at inference: the `"mean"` over iterations,
            weighted by the halting probabilities as in training, or the `"final"` state.
        ponder_cost: Weight in the training loss of the mean of iterations plus remainder.
        backprop_iterations: Gradients flow through this many last iterations. `None` for all.
        sample_iterations: Whether each training step draws its own k from 1 to
            `max_think_iterations`, so that one model serves them all.
        warmup_steps: Training steps over which the largest k of a step rises from 1 to
            `max_think_iterations`.
        input_injection: Whether a learned projection of the encoder's output, zero at first, is
            added to the state before every iteration but the first.
        use_layer_router: Whether a router per think layer skips or repeats it (Dr.LLM).
        layer_router: `LayerRouterConfig` (or its fields as a dict).
        router_warmup_steps: Training steps in which every think layer runs once all the same.
        use_lora_experts: Whether a router picks low-rank experts of the think layers (MoDr).
        num_lora_experts: Their number.
        lora_expert: `LoRAExpertConfig` (or its fields as a dict).
        expert_warmup_steps: Training steps in which all experts take part with equal weights.

    Raises:
        ValueError: a value out of range, or an unknown name.

    Reference: Encode, Think, Decode, arXiv 2510.07358.

    Example:

    ```python
    from qwen3_next import ETDConfig

    config = ETDConfig.from_ratio(48, 0.25, 0.5, 0.25)
    assert config.get_layer_ranges()["think"] == (12, 36)
    ```
    """

    n_encoder_layers: int = 7
    n_think_layers: int = 4
    n_decoder_layers: int = 5
    max_think_iterations: int = 5
    adaptive_depth: bool = True
    confidence_threshold: float = 0.9
    granularity: str = "token"
    inference_state: str = "mean"
    ponder_cost: float = 0.0
    backprop_iterations: int | None = None
    sample_iterations: bool = False
    warmup_steps: int = 0
    input_injection: bool = False
    use_layer_router: bool = False
    layer_router: LayerRouterConfig = LAYER_ROUTER
    router_warmup_steps: int = 1000
    use_lora_experts: bool = False
    num_lora_experts: int = 4
    lora_expert: LoRAExpertConfig = LORA_EXPERT
    expert_warmup_steps: int = 500

    RULES: ClassVar[dict[str, Rule]] = {
        "n_encoder_layers": integer(0),
        "n_think_layers": integer(1),
        "n_decoder_layers": integer(0),
        "max_think_iterations": integer(1),
        "adaptive_depth": BOOLEAN,
        "confidence_threshold": number("in (0, 1]", lambda value: 0 < value <= 1),
        "granularity": one_of(GRANULARITIES),
        "inference_state": one_of(STATES),
        "ponder_cost": NOT_NEGATIVE,
        "backprop_iterations": optional_integer(1),
        "sample_iterations": BOOLEAN,
        "warmup_steps": integer(0),
        "input_injection": BOOLEAN,
        "use_layer_router": BOOLEAN,
        "layer_router": _nested(LayerRouterConfig),
        "router_warmup_steps": integer(0),
        "use_lora_experts": BOOLEAN,
        "num_lora_experts": integer(1),
        "lora_expert": _nested(LoRAExpertConfig),
        "expert_warmup_steps": integer(0),
    }

    def __post_init__(self) -> None:
        for name, kind in (("layer_router", LayerRouterConfig), ("lora_expert", LoRAExpertConfig)):
            if isinstance(getattr(self, name), dict):
                object.__setattr__(self, name, kind.from_dict(getattr(self, name)))
        self.check_fields()
        self._check_used()
        if self.ponder_cost and not self.adaptive_depth:
            raise ValueError(
                "`ponder_cost` is a price on adaptive depth: it needs `adaptive_depth=True`. "
                f"Received: ponder_cost={self.ponder_cost}, adaptive_depth=False"
            )

    def _check_used(self):
        """Refuses settings of a part that is not there: nothing would read them."""
        for use, names in USED_WITH.items():
            for name in names:
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if not getattr(self, use) and value != default:
                    raise ValueError(f"`{name}` needs `{use}=True`. Received: {name}={value}")
        if self.use_layer_router and self.layer_router.use_gumbel and self.backprop_iterations:
            raise ValueError(
                "Layer routers decide in the first iteration: with `use_gumbel` their gradients "
                "need `backprop_iterations=None`. "
                f"Received: backprop_iterations={self.backprop_iterations}"
            )

    @property
    def has_weights(self) -> bool:
        """Whether the loop has weights beyond those of its layers."""
        routed = self.use_layer_router or self.use_lora_experts
        return self.adaptive_depth or self.input_injection or routed

    @property
    def num_layers(self) -> int:
        """Layers of the model, each counted once."""
        return self.n_encoder_layers + self.n_think_layers + self.n_decoder_layers

    @classmethod
    def from_ratio(
        cls, num_layers: int, encoder: float, think: float, decoder: float, **fields: Any
    ) -> Self:
        """Splits `num_layers` by fractions that sum to 1; what rounding leaves, thinks.

        Raises:
            ValueError: fractions out of range or that do not sum to 1, or a model too short.
        """
        require(integer(1), "num_layers", num_layers)
        for name, value in (("encoder", encoder), ("think", think), ("decoder", decoder)):
            require(FRACTION, name, value)
        if abs(encoder + think + decoder - 1) > 1e-6:
            raise ValueError(
                "`encoder`, `think` and `decoder` must sum to 1. "
                f"Received: {encoder=}, {think=}, {decoder=}"
            )
        first, last = round(num_layers * encoder), round(num_layers * decoder)
        if num_layers - first - last < 1:
            raise ValueError(
                "The model is too short: no layer is left to think. "
                f"Received: {num_layers=}, {encoder=}, {think=}, {decoder=}"
            )
        return cls(first, num_layers - first - last, last, **fields)

    @classmethod
    def from_profile(cls, profile: Split, **fields: Any) -> Self:
        """Takes the layer counts from a profile's `split`, see `qwen3_next.profile_layers`.

        Raises:
            ValueError: what has no such split, and as the profile's `split`.
        """
        split: Any = getattr(profile, "split", None)
        if not is_list_of(split, integer(0).fits) or len(split) != 3:
            raise ValueError(
                "`profile` must have a `split` of three layer counts, as a LayerProfile has. "
                f"Received: profile={shown(profile)}"
            )
        return cls(*split, **fields)

    @classmethod
    def published_16_layers(cls, **fields: Any) -> Self:
        """The split of the paper's OLMo-2-1B: 7 layers encode, 4 think, 5 decode."""
        return cls(7, 4, 5, **fields)

    @classmethod
    def published_48_layers(cls, **fields: Any) -> Self:
        """12 layers encode, 24 think, 12 decode: a quarter, a half and a quarter of 48 layers."""
        return cls(12, 24, 12, **fields)

    def validate(self, num_layers: int) -> None:
        """Raises `ValueError` unless the counts sum to the layers of a model."""
        if num_layers != self.num_layers:
            raise ValueError(
                "`n_encoder_layers + n_think_layers + n_decoder_layers` must be the number of "
                f"layers of the model. Received: {self.n_encoder_layers} + {self.n_think_layers} + "
                f"{self.n_decoder_layers} = {self.num_layers}, num_layers={num_layers}"
            )

    def get_layer_ranges(self) -> dict[str, tuple[int, int]]:
        """First layer and the one behind the last of `"encoder"`, `"think"` and `"decoder"`."""
        first = self.n_encoder_layers
        behind = first + self.n_think_layers
        return {
            "encoder": (0, first),
            "think": (first, behind),
            "decoder": (behind, self.num_layers),
        }
