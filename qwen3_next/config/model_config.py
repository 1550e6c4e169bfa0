"""The configuration of a model: one frozen dataclass, every field live and checked."""

import dataclasses
from dataclasses import dataclass

from qwen3_next import variants
from qwen3_next.config.mtp_config import MTPConfig
from qwen3_next.layers.norms import NORMALIZATIONS
from qwen3_next.layers.partial_rotary_embedding import rotary_dim
from qwen3_next.layers.swiglu import GATED_ACTIVATIONS

LINEAR, FULL = "linear_attention", "full_attention"
ATTENTION_TYPES = ("gated_attention", "group_query_attention")


@dataclass(frozen=True)
class Qwen3NextConfig:
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
        num_experts: Experts of a mixture layer, 0 for dense layers everywhere.
        num_experts_per_tok: Experts a token.
        moe_intermediate_size: Width of an expert.
        shared_expert_intermediate_size: Width of the shared expert, 0 for none.
        norm_topk_prob: Whether the weights of the chosen experts are divided by their sum.
        router_aux_loss_coef: Weight of the load-balancing loss in training.
        mlp_only_layers: Layers that are dense although the others are mixtures.
        decoder_sparse_step: Layer i is a mixture when `(i + 1)` is a multiple of this.
        dropout: Dropout rate on the residual branches.
        attention_dropout: Dropout rate on the attention weights.
        normalization_type: `"zero_centered_rms_norm"` or `"rms_norm"`.
        attention_type: `"gated_attention"` or `"group_query_attention"` (no output gate).
        ffn_type: `"swiglu"` or `"geglu"`.
        mtp: `MTPConfig` (or its fields as a dict) of a language model that predicts several tokens
            ahead, or `None`.

    Raises:
        ValueError: a value out of range, alone or together with another, or an unknown name.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int | None = 256
    intermediate_size: int = 5120
    max_position_embeddings: int = 262144
    rope_theta: float = 10000000.0
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    full_attention_interval: int | None = None
    layer_types: tuple[str, ...] | None = None
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
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    dropout: float = 0.0
    attention_dropout: float = 0.0
    normalization_type: str = "zero_centered_rms_norm"
    attention_type: str = "gated_attention"
    ffn_type: str = "swiglu"
    mtp: MTPConfig | None = None

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("layer_types", "mlp_only_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.mtp, dict):
            object.__setattr__(self, "mtp", MTPConfig.from_dict(self.mtp))
        self._check_ranges()
        self._check_together()
        if self.layer_types is None:
            interval = self.full_attention_interval or 4
            object.__setattr__(self, "full_attention_interval", interval)
            object.__setattr__(self, "layer_types", self._every(interval))
        elif self.full_attention_interval is None:
            # So that equal models have equal configurations, however they were spelled.
            fitting = (
                n for n in range(1, self.num_layers + 1) if self._every(n) == self.layer_types
            )
            object.__setattr__(self, "full_attention_interval", next(fitting, None))

    @classmethod
    def from_variant(cls, name, **overrides):
        """The configuration called `name` in `variants/`, with some fields replaced."""
        return cls.from_dict({**variants.load(name), **overrides})

    @classmethod
    def from_dict(cls, fields):
        """Builds a configuration; an unknown key raises `ValueError` that lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"Unknown configuration fields: {unknown}. Known fields: {known}")
        return cls(**fields)

    def to_dict(self):
        """The fields as JSON-able values."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def replace(self, **changes):
        """A copy with some fields changed."""
        fields = self.to_dict()
        if {"num_layers", "full_attention_interval"} & set(changes):
            fields["layer_types"] = None
        if "layer_types" in changes:
            fields["full_attention_interval"] = None
        return self.from_dict({**fields, **changes})

    def is_moe(self, layer):
        """Whether a layer's feed-forward network is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self):
        """Indices of the mixture layers."""
        return [i for i in range(self.num_layers) if self.is_moe(i)]

    def _check_ranges(self):
        at_least_one = (
            "vocab_size hidden_size num_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings linear_num_key_heads "
            "linear_num_value_heads linear_key_head_dim linear_value_head_dim "
            "linear_conv_kernel_dim num_experts_per_tok moe_intermediate_size decoder_sparse_step"
        )
        for name in at_least_one.split():
            self._require(name, "an integer of at least 1", _is_int(getattr(self, name), 1))
        for name in ("num_experts", "shared_expert_intermediate_size"):
            self._require(name, "an integer of at least 0", _is_int(getattr(self, name), 0))
        interval = self.full_attention_interval
        self._require(
            "full_attention_interval",
            "None or an integer of at least 1",
            interval is None or _is_int(interval, 1),
        )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            self._require(name, "above 0", _is_number(getattr(self, name), 0.0, open_low=True))
        self._require("partial_rotary_factor", "in (0, 1]", 0 < self.partial_rotary_factor <= 1)
        self._require(
            "router_aux_loss_coef", "at least 0", _is_number(self.router_aux_loss_coef, 0.0)
        )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            self._require(name, "in [0, 1)", _is_number(value, 0.0) and value < 1)
        fine = self.mtp is None or isinstance(self.mtp, MTPConfig)
        self._require("mtp", "None, an MTPConfig or a dict of its fields", fine)
        for name in ("tie_word_embeddings", "norm_topk_prob"):
            self._require(name, "a bool", isinstance(getattr(self, name), bool))
        for name, known in (
            ("normalization_type", sorted(NORMALIZATIONS)),
            ("attention_type", ATTENTION_TYPES),
            ("ffn_type", sorted(GATED_ACTIVATIONS)),
        ):
            self._require(name, f"one of {list(known)}", getattr(self, name) in known)

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
        rotary_dim(self.head_dim, self.partial_rotary_factor)
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                "`num_experts_per_tok` must be at most `num_experts`. Received: "
                f"num_experts_per_tok={self.num_experts_per_tok}, num_experts={self.num_experts}"
            )
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"`mlp_only_layers` must be layers below `num_layers`={self.num_layers}. "
                f"Received: mlp_only_layers={self.mlp_only_layers}"
            )
        kinds = self.layer_types
        if kinds is None:
            return
        if len(kinds) != self.num_layers or set(kinds) - {LINEAR, FULL}:
            raise ValueError(
                f"`layer_types` must name {LINEAR!r} or {FULL!r} for each of "
                f"`num_layers`={self.num_layers} layers. Received: layer_types={kinds}"
            )
        interval = self.full_attention_interval
        if interval is not None and kinds != self._every(interval):
            raise ValueError(
                "`layer_types` and `full_attention_interval` disagree; give one of them. "
                f"Received: layer_types={kinds}, full_attention_interval={interval}"
            )

    def _every(self, interval):
        layers = range(1, self.num_layers + 1)
        return tuple(LINEAR if layer % interval else FULL for layer in layers)

    def _require(self, name, what, condition):
        if not condition:
            raise ValueError(f"`{name}` must be {what}. Received: {name}={getattr(self, name)!r}")


def _is_int(value, low):
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value, low, open_low=False):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value > low if open_low else value >= low
