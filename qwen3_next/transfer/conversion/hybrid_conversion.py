"""The weights of a hybrid from those of a Qwen3, one at a time.

    norms                1 + w' = w                      where norms are zero-centred
    attention that stays W_q' = [W_q | W_g],  W_o' = W_o / sigmoid(b)      (b: bias of the gate)
    Gated DeltaNet       heads as `head_mapping` says, the source's gains in W_q and W_k,
                         convolution at its last tap, beta = 1/2, decay of a stated half-life
    all else             as it is

What needs the source's activations (`deltanet_calibration`) comes afterwards.
"""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from qwen3_next.config import CrossArchTransferConfig, Qwen3NextConfig
from qwen3_next.config.model_config import FULL, LINEAR
from qwen3_next.layers.initializers import LogUniform, Normal
from qwen3_next.models.weight_rows import Weight
from qwen3_next.transfer.conversion.head_mapping import (
    HeadCounts,
    by_key_head,
    check_heads,
    expand_heads,
    reduce_heads,
    sum_heads,
)

KINDS = COPIED, TRANSFORMED, INITIALISED = "copied", "transformed", "initialised"
SMALL_TAP = 0.05
SMALL_GATE = 0.01
_LAYER = re.compile(r"(model/layers_\d+)/(.+)")
# Fields that a conversion may change beside those that it makes.
SETTABLE = (
    "attention_type",
    "normalization_type",
    "dropout",
    "attention_dropout",
    "max_position_embeddings",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
)
# What a Qwen3 is among the configurations of the one model class.
_QWEN3 = {
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
    "mtp": None,
    "etd": None,
}


def hybrid_config(
    source: Qwen3NextConfig, transfer: CrossArchTransferConfig, **fields: Any
) -> Qwen3NextConfig:
    """The configuration of the hybrid that a source becomes, before it has experts.

    Args:
        source: Configuration of a Qwen3 or Qwen3-MoE.
        transfer: `CrossArchTransferConfig`.
        **fields: Fields of `Qwen3NextConfig` to replace, such as
            `attention_type="group_query_attention"` for no output gate.

    Raises:
        ValueError: a source of another family, or heads or layers that cannot be mapped.
    """
    for name, value in _QWEN3.items():
        if getattr(source, name) != value:
            raise ValueError(
                f"The source must be a Qwen3 or a Qwen3-MoE, with {name}={value!r}. "
                f"Received: {name}={getattr(source, name)!r}"
            )
    if set(source.layer_types) != {FULL}:
        raise ValueError(
            "The source must have attention in all layers. "
            f"Received: layer_types={source.layer_types}"
        )
    if transfer.num_experts and source.moe_layers:
        raise ValueError(
            "`num_experts` must be 0 for a source with experts of its own. "
            f"Received: num_experts={transfer.num_experts}, a source of {source.num_experts}"
        )
    hybrid = transfer.hybrid_attention
    if hybrid.head_dim not in (None, source.head_dim):
        raise ValueError(
            f"`head_dim` must be None or the source's {source.head_dim}. "
            f"Received: head_dim={hybrid.head_dim}"
        )
    values = hybrid.n_heads or source.num_attention_heads
    keys = hybrid.n_kv_heads or values
    counts = HeadCounts(source.num_attention_heads, source.num_key_value_heads, keys, values)
    check_heads(counts)
    made = {
        "layer_types": hybrid.layer_types_of(source.num_layers),
        "attention_type": "gated_attention",
        "attention_gate_bias": transfer.gate_bias_value,
        "normalization_type": "zero_centered_rms_norm",
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": source.head_dim,
        "linear_value_head_dim": source.head_dim,
        "linear_conv_kernel_dim": hybrid.conv_kernel_dim,
    }
    wrong = sorted(set(fields) - set(SETTABLE))
    if wrong:
        raise ValueError(
            f"A conversion may change what has no weights: {list(SETTABLE)}. Received: {wrong}"
        )
    return source.replace(**{**made, **fields})


class HybridConversion:
    """Makes the weights of a hybrid, and notes for the report what it made of what.

    Args:
        source: Configuration of the source.
        config: Configuration of the hybrid, from `hybrid_config`.
        transfer: `CrossArchTransferConfig`.
        read: From the path of a weight of the source to its array.
    """

    def __init__(
        self,
        source: Qwen3NextConfig,
        config: Qwen3NextConfig,
        transfer: CrossArchTransferConfig,
        read: Callable[[str], np.ndarray],
    ) -> None:
        self.config, self.transfer = config, transfer
        self._read = read
        self.used: set[str] = set()
        self.paths: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.heads = HeadCounts(
            source.num_attention_heads,
            source.num_key_value_heads,
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )

    def array(self, row: Weight) -> np.ndarray:
        """The values of a weight of the hybrid."""
        made = self._make(row)
        if made is None:
            made = self.fresh(row), INITIALISED
        self.paths[made[1]].append(row.path)
        return made[0]

    def _make(self, row):
        """The values and what they are, or `None` for those of a new model."""
        flags, layer = self.transfer, _LAYER.fullmatch(row.path)
        inside = layer[2] if layer else ""
        if layer and inside.startswith("linear_attn/"):
            base, leaf = f"{layer[1]}/self_attn", inside.split("/", 1)[1]
            return self._deltanet(row, base, leaf) if flags.copy_attention_weights else None
        if inside.startswith("self_attn/"):
            return self._attention(row) if flags.copy_attention_weights else None
        if row.part == "norm":
            return self._norm(row) if flags.copy_norm_weights else None
        within_layer = inside.startswith("mlp/")
        copies = flags.copy_ffn_weights if within_layer else flags.copy_embedding_weights
        return (self.read(row.path), COPIED) if copies else None

    def read(self, path: str) -> np.ndarray:
        """A weight of the source."""
        self.used.add(path)
        return self._read(path)

    def fresh(self, row: Weight) -> np.ndarray:
        """What a new model has there."""
        leaf = row.path.rsplit("/", 1)[1]
        if leaf == "gate_bias":
            return np.full(row.shape, self.config.attention_gate_bias, "float32")
        if leaf == "dt_bias" or row.path.endswith("linear_attn/norm/weight"):
            return np.ones(row.shape, "float32")
        if row.part == "norm":
            return np.full(row.shape, 1.0 if leaf == "scale" else 0.0, "float32")
        std = self.config.initializer_range
        draw = LogUniform(0.01, 16.0) if leaf == "A_log" else Normal(std)
        return draw.draw(self.generator(row.path), row.shape)

    def generator(self, path: str) -> np.random.Generator:
        """Draws for one weight, whatever the others are."""
        return np.random.default_rng([self.transfer.seed, *path.encode()])

    def _norm(self, row):
        """`scale` of a plain norm as the `weight` of a zero-centred one."""
        path, leaf = row.path.rsplit("/", 1)
        scale = self.read(f"{path}/scale")
        return (scale, COPIED) if leaf == "scale" else (scale.astype("float32") - 1, TRANSFORMED)

    def _attention(self, row):
        if row.part == "norm":
            return self._norm(row)
        if row.path.endswith("/gate_bias"):
            return None
        array = self.read(row.path)
        gated, name = self.config.attention_type == "gated_attention", row.path.split("/")[-2]
        if gated and name == "q_proj":
            return np.concatenate([array, self._gate(row.path, array)], axis=-1), TRANSFORMED
        if gated and name == "o_proj" and self.transfer.gate_init_strategy != "ones":
            opening = 1.0 / (1.0 + math.exp(-(self.transfer.gate_bias_value or 0.0)))
            return array.astype("float32") / np.float32(opening), TRANSFORMED
        return array, COPIED

    def _gate(self, path, query):
        if self.transfer.gate_init_strategy != "small":
            return np.zeros_like(query)
        drawn = self.generator(path + "/gate").standard_normal(query.shape, "float32")
        return (SMALL_GATE * drawn).astype(query.dtype)

    def _deltanet(self, row, base, leaf):
        hybrid = self.transfer.hybrid_attention
        if leaf == "in_proj_qkvz/kernel":
            return self._qkvz(row, base), TRANSFORMED
        if leaf == "out_proj/kernel":
            output = self._float32(f"{base}/o_proj/kernel")
            return sum_heads(output, self.heads.value_heads), TRANSFORMED
        values = np.zeros(row.shape, "float32")  # A_log: rate 1; no weights of beta and decay
        if leaf == "conv1d":
            values[-1] = SMALL_TAP if hybrid.conv_init == "small_tap" else 1.0
        elif leaf == "dt_bias":
            values[:] = dt_bias_of(hybrid.half_life)
        elif leaf == "norm/weight":
            values[:] = 1.0
        return values, INITIALISED

    def _qkvz(
        self, row: Weight, base: str
    ) -> Annotated[np.ndarray, "D K_heads [q | k | v of its heads | z of its heads]"]:
        hybrid, keys = self.transfer.hybrid_attention, self.heads.key_heads
        query, key, value = (self._float32(f"{base}/{name}_proj/kernel") for name in "qkv")
        if hybrid.qk_norm:
            query *= self._float32(f"{base}/q_norm/scale")
            key *= self._float32(f"{base}/k_norm/scale")
        value = expand_heads(value, self.heads.value_heads)
        gate = np.zeros_like(value)
        if hybrid.output_gate_init == "random":
            drawn = self.generator(row.path + "/gate").standard_normal(value.shape, "float32")
            gate = self.config.initializer_range * drawn
        query = reduce_heads(query, keys, hybrid.query_reduction)
        return by_key_head([query, expand_heads(key, keys), value, gate], keys)

    def _float32(self, path):
        """A weight of the source to compute with; half precision would round at every step."""
        return np.array(self.read(path), "float32")

    def choices(self) -> dict[str, str]:
        """How the weights were made that the source has none for."""
        hybrid, found = self.transfer.hybrid_attention, {}
        if LINEAR in self.config.layer_types and self.transfer.copy_attention_weights:
            found = {
                "convolution": hybrid.conv_init,
                "decay": f"half-life of {hybrid.half_life:g} tokens",
                "beta": "1/2",
                "output gate of Gated DeltaNets": hybrid.output_gate_init or "zero",
            }
        if FULL in self.config.layer_types and self.config.attention_type == "gated_attention":
            found["output gate of attention"] = self.transfer.gate_init_strategy
        return found


def dt_bias_of(half_life: Annotated[np.ndarray, "..."] | float) -> Any:
    """The bias with which a state halves in so many tokens, at rate 1: softplus^-1(ln 2 / n)."""
    return np.log(np.expm1(math.log(2.0) / np.asarray(half_life, "float64")))
