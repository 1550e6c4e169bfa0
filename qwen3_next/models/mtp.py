"""The MTP modules of a configuration: one for all steps, or one per step.

At token i step k reads what step k - 1 left (the backbone's hidden state for k = 1) and the
embedding of token i + k, and predicts token i + k + 1.
"""

from typing import Any

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.model_config import FULL
from qwen3_next.config.validation import Rule, is_list_of, require
from qwen3_next.layers import DecoderLayer, MultiTokenPrediction, SwiGLU
from qwen3_next.models.assembly import make_decoder_layer, make_feed_forward
from qwen3_next.models.weight_table import mtp_name


def make_mtp_modules(
    config: Qwen3NextConfig, gradient_checkpointing: bool, dtype: Any
) -> list[MultiTokenPrediction]:
    """The built modules of a configuration."""
    modules = []
    for number in range(config.mtp.num_modules if config.mtp is not None else 0):
        module = MultiTokenPrediction(
            _make_body(config, gradient_checkpointing, dtype),
            normalization_type=config.normalization_type,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            name=mtp_name(number),
            dtype=dtype,
        )
        module.build((None, None, config.hidden_size))
        modules.append(module)
    return modules


def check_mtp_modules(config: Qwen3NextConfig, modules: Any) -> None:
    """Raises `ValueError` for shared modules that are not those of a configuration."""
    count = 0 if config.mtp is None else config.mtp.num_modules
    shape = (2 * config.hidden_size, config.hidden_size)
    what = f"None or a list of {count} built modules with an `fc` of shape {shape}"

    def fits(module):
        if not isinstance(module, MultiTokenPrediction) or not module.built:
            return False
        return tuple(module.fc.kernel.shape) == shape

    require(
        Rule(what, lambda given: is_list_of(given, fits) and len(given) == count),
        "mtp_modules",
        modules,
    )


def _make_body(config, gradient_checkpointing, dtype) -> DecoderLayer | SwiGLU | None:
    kind = config.mtp.mtp_head_type
    if kind == "transformer":
        return make_decoder_layer(
            config,
            FULL,
            config.num_experts > 0,
            gradient_checkpointing=gradient_checkpointing,
            name="layers_0",
            dtype=dtype,
        )
    return make_feed_forward(config, dtype) if kind == "mlp" else None
