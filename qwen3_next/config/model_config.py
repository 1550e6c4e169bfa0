"""The configuration of a model: one frozen dataclass, every field live and checked."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from qwen3_next import variants
from qwen3_next.config.etd_config import ETDConfig
from qwen3_next.config.lora_expert_config import ATTENTION_PROJECTIONS, DELTANET_PROJECTIONS
from qwen3_next.config.mtp_config import MTPConfig
from qwen3_next.config.validation import (
    BOOLEAN,
    DROPOUT_RATE,
    NOT_NEGATIVE,
    OPTIONAL_NUMBER,
    POSITIVE,
    Config,
    Rule,
    integer,
    is_list_of,
    number,
    one_of,
    optional_integer,
    require,
)

LINEAR, FULL = "linear_attention", "full_attention"
ATTENTION_TYPES = ("gated_attention", "group_query_attention")
# The layers know what these names mean; a test holds both lists together.
NORMALIZATION_TYPES = ("rms_norm", "zero_centered_rms_norm")
FFN_TYPES = ("geglu", "swiglu")


@dataclass(frozen=True)
class Qwen3NextConfig(Config):
    """Dimensions and choices of a model. The defaults are the published Qwen3-Next-80B-A3B.

    Args:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        num_layers: Decoder layers.
        num_attention_heads: Query heads of a full-attention layer.
        num_key_value_heads: Its key and value heads.
        head_dim: Width of a head. `None` for `hidden_size // num_attention_heads`.
        intermediate_size: Width of a dense feed-forward network.
        max_position_embeddings: Longest sequence, prompt and generation together.
        rope_theta: Base of the rotary wavelengths.
        partial_rotary_factor: Fraction of a head that is rotated.
        rms_norm_eps: Epsilon of all norms.
        initializer_range: Standard deviation of the initial weights.
        tie_word_embeddings: Whether the language-model head is the transposed embedding.
        full_attention_interval: Layer i is full attention when `(i + 1)` is a multiple of this.
            `None` for 4, or where `layer_types` says it.
        layer_types: One of `"linear_attention"`, `"full_attention"` for every layer, or `None`.
        linear_num_key_heads, linear_num_value_heads: Heads of a Gated DeltaNet layer.
        linear_key_head_dim, linear_value_head_dim: Widths of its heads.
        linear_conv_kernel_dim: Taps of its convolution.
        num_experts: Experts of an MoE layer, 0 for dense layers everywhere.
        num_experts_per_tok: Experts per token.
        moe_intermediate_size: Width of an expert.
        shared_expert_intermediate_size: Width of the shared expert, 0 for none.
        norm_topk_prob: Whether the weights of the chosen experts are divided by their sum.
        router_aux_loss_coef: Weight of the load-balancing loss in training.
        router_aux_loss_scope: `"layer"` for the mean of every layer's own load-balancing loss;
            `None` for one of all layers pooled, as published.
        mlp_only_layers: Layers that are dense although the others are MoE layers.
        decoder_sparse_step: Layer i is an MoE layer when `(i + 1)` is a multiple of this.
        dropout: Dropout rate on the residual branches.
        attention_dropout: Dropout rate on the attention weights.
        normalization_type: `"zero_centered_rms_norm"` or `"rms_norm"`.
        attention_type: `"gated_attention"` or `"group_query_attention"` (no output gate).
        attention_gate_bias: Initial value of a bias of the output gate of `"gated_attention"`, one
            per channel; `None` for no bias, as published.
        ffn_type: `"swiglu"` or `"geglu"`.
        mtp: `MTPConfig` (or its fields as a dict) of a language model that predicts several tokens
            ahead, or `None`.
        etd: `ETDConfig` (or its fields as a dict) of a model some of whose layers think, or `None`.

    Raises:
        ValueError: a value out of range, alone or together with another, or an unknown name.

    Example:

    ```python
    from qwen3_next import Qwen3NextConfig

    config = Qwen3NextConfig.from_variant("tiny", num_experts=8)
    assert config.replace(num_layers=8).layer_types.count("full_attention") == 2
    ```
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256  # never None once it is constructed
    intermediate_size: int = 5120
    max_position_embeddings: int = 262144
    rope_theta: float = 10000000.0
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    full_attention_interval: int | None = None
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]  # likewise
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    router_aux_loss_scope: str | None = None
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    dropout: float = 0.0
    attention_dropout: float = 0.0
    normalization_type: str = "zero_centered_rms_norm"
    attention_type: str = "gated_attention"
    attention_gate_bias: float | None = None
    ffn_type: str = "swiglu"
    mtp: MTPConfig | None = None
    etd: ETDConfig | None = None

    RULES: ClassVar[dict[str, Rule]] = {
        "vocab_size": integer(1),
        "hidden_size": integer(1),
        "num_layers": integer(1),
        "num_attention_heads": integer(1),
        "num_key_value_heads": integer(1),
        "head_dim": integer(1),
        "intermediate_size": integer(1),
        "max_position_embeddings": integer(1),
        "rope_theta": POSITIVE,
        "partial_rotary_factor": number("in (0, 1]", lambda value: 0 < value <= 1),
        "rms_norm_eps": POSITIVE,
        "initializer_range": POSITIVE,
        "tie_word_embeddings": BOOLEAN,
        "full_attention_interval": optional_integer(1),
        "layer_types": Rule(
            f"None or a list of {LINEAR!r} and {FULL!r}",
            lambda value: value is None or is_list_of(value, one_of((LINEAR, FULL)).fits),
        ),
        "linear_num_key_heads": integer(1),
        "linear_num_value_heads": integer(1),
        "linear_key_head_dim": integer(1),
        "linear_value_head_dim": integer(1),
        "linear_conv_kernel_dim": integer(1),
        "num_experts": integer(0),
        "num_experts_per_tok": integer(1),
        "moe_intermediate_size": integer(1),
        "shared_expert_intermediate_size": integer(0),
        "norm_topk_prob": BOOLEAN,
        "router_aux_loss_coef": NOT_NEGATIVE,
        "router_aux_loss_scope": Rule("None or 'layer'", lambda v: v is None or v == "layer"),
        "mlp_only_layers": Rule(
            "a list of layer numbers", lambda value: is_list_of(value, integer(0).fits)
        ),
        "decoder_sparse_step": integer(1),
        "dropout": DROPOUT_RATE,
        "attention_dropout": DROPOUT_RATE,
        "normalization_type": one_of(NORMALIZATION_TYPES),
        "attention_type": one_of(ATTENTION_TYPES),
        "attention_gate_bias": OPTIONAL_NUMBER,
        "ffn_type": one_of(FFN_TYPES),
        "mtp": Rule(
            "None, an MTPConfig or a dict of its fields",
            lambda value: value is None or isinstance(value, MTPConfig),
        ),
        "etd": Rule(
            "None, an ETDConfig or a dict of its fields",
            lambda value: value is None or isinstance(value, ETDConfig),
        ),
    }

    def __post_init__(self) -> None:
        if self.head_dim is None:
            for name in ("hidden_size", "num_attention_heads"):
                require(self.RULES[name], name, getattr(self, name))
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("layer_types", "mlp_only_layers"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                self._set(name, tuple(getattr(self, name)))
        if isinstance(self.mtp, dict):
            self._set("mtp", MTPConfig.from_dict(self.mtp))
        if isinstance(self.etd, dict):
            self._set("etd", ETDConfig.from_dict(self.etd))
        self.check_fields()
        self._check_together()
        self._complete_layer_types()
        if self.etd is not None and self.etd.use_lora_experts:
            self._check_adapted(self.etd)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> Self:
        """The configuration called `name` in `variants/`, with some fields replaced."""
        return cls.from_dict({**variants.load(name), **overrides})

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; layer types follow the number of layers."""
        followers: dict[str, None] = {}
        if {"num_layers", "full_attention_interval"} & set(changes):
            followers["layer_types"] = None
        if "layer_types" in changes:
            followers["full_attention_interval"] = None
        return super().replace(**{**followers, **changes})

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward network is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the MoE layers."""
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]

    @property
    def learns_beside_backbone(self) -> bool:
        """Whether a model has weights to train beyond embedding, layers, final norm and head."""
        return self.mtp is not None or (self.etd is not None and self.etd.has_weights)

    def _check_together(self):
        for name, divisor in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"`{name}` must be a multiple of `{divisor}`. Received: "
                    f"{name}={getattr(self, name)}, {divisor}={getattr(self, divisor)}"
                )
        rotated = int(self.head_dim * self.partial_rotary_factor)
        if rotated % 2 or rotated == 0:
            raise ValueError(
                "`head_dim * partial_rotary_factor` must be even and at least 2. Received: "
                f"head_dim={self.head_dim}, partial_rotary_factor={self.partial_rotary_factor}"
            )
        if self.attention_gate_bias is not None and self.attention_type != "gated_attention":
            raise ValueError(
                "`attention_gate_bias` needs `attention_type='gated_attention'`. Received: "
                f"attention_gate_bias={self.attention_gate_bias}, "
                f"attention_type={self.attention_type!r}"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                "`num_experts_per_tok` must be at most `num_experts`. Received: "
                f"num_experts_per_tok={self.num_experts_per_tok}, num_experts={self.num_experts}"
            )
        if any(layer >= self.num_layers for layer in self.mlp_only_layers):
            raise ValueError(
                f"`mlp_only_layers` must be layers below `num_layers`={self.num_layers}. "
                f"Received: mlp_only_layers={self.mlp_only_layers}"
            )
        if self.etd is not None:
            self.etd.validate(self.num_layers)
        if self.mtp is not None and (self.mtp.draft_vocab_size or 0) > self.vocab_size:
            raise ValueError(
                "`draft_vocab_size` must be at most `vocab_size`. Received: "
                f"draft_vocab_size={self.mtp.draft_vocab_size}, vocab_size={self.vocab_size}"
            )
        if self.layer_types is not None:
            self._check_layer_types()

    def _check_layer_types(self):
        kinds, interval = self.layer_types, self.full_attention_interval
        if len(kinds) != self.num_layers:
            raise ValueError(
                f"`layer_types` must name {LINEAR!r} or {FULL!r} for each of "
                f"`num_layers`={self.num_layers} layers. Received: layer_types={kinds!r}"
            )
        if interval is not None and kinds != self._full_every(interval):
            raise ValueError(
                "`layer_types` and `full_attention_interval` disagree; give one of them. "
                f"Received: layer_types={kinds}, full_attention_interval={interval}"
            )

    def adapted_projections(self, layer: int) -> tuple[str, ...]:
        """The projections of a layer that LoRA experts change."""
        first, behind = self.etd.get_layer_ranges()["think"] if self.etd is not None else (0, 0)
        if self.etd is None or not self.etd.use_lora_experts or not first <= layer < behind:
            return ()
        linear = self.layer_types[layer] == LINEAR
        known = DELTANET_PROJECTIONS if linear else ATTENTION_PROJECTIONS
        return self.etd.lora_expert.targets_of(known)

    def _check_adapted(self, etd):
        wanted = etd.lora_expert.target_modules or ()
        first, behind = etd.get_layer_ranges()["think"]
        found = {name for i in range(first, behind) for name in self.adapted_projections(i)}
        missing = sorted(set(wanted) - found)
        if missing:
            raise ValueError(
                "`target_modules` must be projections of the think layers, which have none called "
                f"{missing}. Received: target_modules={wanted}, layer_types of the think layers="
                f"{self.layer_types[first:behind]}"
            )

    def _complete_layer_types(self):
        """Fills in the field that was not given: equal models have equal configurations."""
        if self.layer_types is None:
            interval = self.full_attention_interval or 4
            self._set("full_attention_interval", interval)
            self._set("layer_types", self._full_every(interval))
        elif self.full_attention_interval is None:
            intervals = range(1, self.num_layers + 1)
            fitting = (n for n in intervals if self._full_every(n) == self.layer_types)
            self._set("full_attention_interval", next(fitting, None))

    def _full_every(self, interval):
        layers = range(1, self.num_layers + 1)
        return tuple(LINEAR if layer % interval else FULL for layer in layers)

    def _set(self, name, value):
        object.__setattr__(self, name, value)
