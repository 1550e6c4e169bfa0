"""Which layers of a converted model are Gated DeltaNets, and how they are made."""

from dataclasses import dataclass
from typing import ClassVar

from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.config.validation import (
    BOOLEAN,
    OPTIONAL_NUMBER,
    POSITIVE,
    Config,
    Rule,
    integer,
    is_list_of,
    one_of,
    optional_integer,
)


@dataclass(frozen=True)
class HybridAttentionConfig(Config):
    """Mixers of a hybrid that is made from a model with attention in all layers.

    Args:
        deltanet_layer_pattern: Places within a period whose layers become Gated DeltaNets.
        pattern_period: Layers of a period. The defaults give Qwen3-Next's three to one.
        layer_types: One of `"linear_attention"`, `"full_attention"` for every layer, in place of
            the pattern.
        allow_no_attention: Whether every layer may be converted.
        n_heads: Value heads of a Gated DeltaNet. `None` for the source's query heads H. A divisor
            of H has each head stand for several: their values are one, their output projections
            summed.
        n_kv_heads: Its key heads, which queries have too. `None` for `n_heads`: then every query
            head keeps its own query, and its key and value are copies of the group's. Fewer share
            a query that `query_reduction` makes.
        head_dim: Width of its heads. `None` for the source's, the only one that can be mapped.
        query_reduction: `"mean"` of the query heads that share a key head, or the `"first"`.
        qk_norm: Whether the source's gains of queries and keys go into the projections. The unit
            norm of a Gated DeltaNet then finds the directions that the source's norm leaves.
        conv_kernel_dim: Taps of the convolution; all but the last begin at 0.
        conv_init: `"last_tap"`: the last tap is 1. `"small_tap"`: it is 0.05, where the SiLU behind
            it is nearly linear; the norms of queries, keys and outputs take the scale out.
        decay_init: How fast a state fades. `"attention_distance"`: it halves over the mean distance
            that the source's head looks back, measured on calibration tokens. `"half_life"`: over
            `half_life`. `None` for the first with calibration tokens, else the second.
        half_life: In tokens.
        output_gate_init: `"least_squares"`: norm and output gate are fitted to what the source's
            heads give on calibration tokens. `"zero"`: a closed gate, so that the layer adds
            nothing until it has learned. `"random"`: as in a new model. `None` for the first with
            calibration tokens, else the second.
        output_projection_init: `"copy"` of the source's, or `"least_squares"` from the fitted
            heads to the source's layer output on calibration tokens.
        gate_bias: Whether the output gate of the layers that stay attention has a bias, which the
            published model type has not.
        gate_init_value: Initial value of that bias. `None` for 8 with
            `gate_init_strategy="ones"`, else 0.

    Raises:
        ValueError: a value out of range, or two that contradict each other.

    Example:

    ```python
    from qwen3_next import HybridAttentionConfig

    hybrid = HybridAttentionConfig(deltanet_layer_pattern=[0, 1, 2], pattern_period=4)
    assert hybrid.layer_types_of(36).count("linear_attention") == 27
    assert not hybrid.should_use_deltanet(3)
    ```
    """

    deltanet_layer_pattern: tuple[int, ...] = (0, 1, 2)
    pattern_period: int = 4
    layer_types: tuple[str, ...] | None = None
    allow_no_attention: bool = False
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    query_reduction: str = "mean"
    qk_norm: bool = True
    conv_kernel_dim: int = 4
    conv_init: str = "last_tap"
    decay_init: str | None = None
    half_life: float = 64.0
    output_gate_init: str | None = None
    output_projection_init: str = "copy"
    gate_bias: bool = False
    gate_init_value: float | None = None

    RULES: ClassVar[dict[str, Rule]] = {
        "deltanet_layer_pattern": Rule(
            "a list of different places within a period",
            lambda v: is_list_of(v, integer(0).fits) and len(set(v)) == len(v),
        ),
        "pattern_period": integer(1),
        "layer_types": Rule(
            f"None or a list of {LINEAR!r} and {FULL!r}",
            lambda v: v is None or is_list_of(v, one_of((LINEAR, FULL)).fits),
        ),
        "allow_no_attention": BOOLEAN,
        "n_heads": optional_integer(1),
        "n_kv_heads": optional_integer(1),
        "head_dim": optional_integer(1),
        "query_reduction": one_of(("mean", "first")),
        "qk_norm": BOOLEAN,
        "conv_kernel_dim": integer(1),
        "conv_init": one_of(("last_tap", "small_tap")),
        "decay_init": Rule(
            "None, 'attention_distance' or 'half_life'",
            lambda v: v is None or one_of(("attention_distance", "half_life")).fits(v),
        ),
        "half_life": POSITIVE,
        "output_gate_init": Rule(
            "None, 'least_squares', 'zero' or 'random'",
            lambda v: v is None or one_of(("least_squares", "zero", "random")).fits(v),
        ),
        "output_projection_init": one_of(("copy", "least_squares")),
        "gate_bias": BOOLEAN,
        "gate_init_value": OPTIONAL_NUMBER,
    }

    def __post_init__(self) -> None:
        for name in ("deltanet_layer_pattern", "layer_types"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_fields()
        if any(place >= self.pattern_period for place in self.deltanet_layer_pattern):
            raise ValueError(
                "`deltanet_layer_pattern` must be places below `pattern_period`. Received: "
                f"deltanet_layer_pattern={self.deltanet_layer_pattern}, "
                f"pattern_period={self.pattern_period}"
            )
        if self.gate_init_value is not None and not self.gate_bias:
            raise ValueError(
                "`gate_init_value` needs `gate_bias=True`: the published gate has no bias. "
                f"Received: gate_init_value={self.gate_init_value}, gate_bias=False"
            )

    def should_use_deltanet(self, layer: int) -> bool:
        """Whether a layer becomes a Gated DeltaNet."""
        if self.layer_types is not None:
            return self.layer_types[layer] == LINEAR
        return layer % self.pattern_period in self.deltanet_layer_pattern

    def layer_types_of(self, num_layers: int) -> tuple[str, ...]:
        """The kinds of the layers of a model.

        Raises:
            ValueError: `layer_types` for another number of layers, or no attention left.
        """
        if self.layer_types is not None and len(self.layer_types) != num_layers:
            raise ValueError(
                f"`layer_types` must name a kind for each of {num_layers} layers. "
                f"Received: layer_types={self.layer_types}"
            )
        linear = [self.should_use_deltanet(layer) for layer in range(num_layers)]
        if all(linear) and not self.allow_no_attention:
            raise ValueError(
                "No layer would keep its attention, and recall would be lost: leave some, or say "
                f"`allow_no_attention=True`. Received: {num_layers} layers, deltanet_layer_pattern="
                f"{self.deltanet_layer_pattern}, pattern_period={self.pattern_period}, "
                f"layer_types={self.layer_types}"
            )
        return tuple(LINEAR if is_linear else FULL for is_linear in linear)
