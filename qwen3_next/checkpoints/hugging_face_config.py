"""Translates configurations from and to the `config.json` of transformers.

Three published model types are one model class here: `qwen3_next` is the hybrid, `qwen3` and
`qwen3_moe` are plain attention everywhere. Where a setting would change the numbers and has no
counterpart, translating it is an error.
"""

import dataclasses
from typing import Any

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config.model_config import FULL, LINEAR, POSITIVE
from qwen3_next.config.validation import Rule, integer, is_list_of, require

# Fields with the same meaning on both sides, and what transformers takes for absent keys. Only the
# number of layers has another name there.
_SHARED_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_EXPERT_DEFAULTS: dict[str, Any] = {
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": (),
    "decoder_sparse_step": 1,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        **_SHARED_DEFAULTS,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "qwen3_moe": {
        **_SHARED_DEFAULTS,
        **_EXPERT_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "qwen3_next": {
        **_SHARED_DEFAULTS,
        **_EXPERT_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 512,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
}
# Fields that are translated by rules below, or are for training only.
_RULED = {
    "rope_theta",
    "partial_rotary_factor",
    "layer_types",
    "full_attention_interval",
    "normalization_type",
    "attention_type",
    "ffn_type",
    "dropout",
    "router_aux_loss_scope",
    "mtp",
}
_PLAIN = {
    "attention_type": "group_query_attention",
    "normalization_type": "rms_norm",
    "partial_rotary_factor": 1.0,
}
_GATED = {"attention_type": "gated_attention", "normalization_type": "zero_centered_rms_norm"}
_TABLE = Rule("None or an object", lambda value: value is None or isinstance(value, dict))
_POSITIVE_OR_NONE = Rule("None or above 0", lambda value: value is None or POSITIVE.fits(value))
# What the rules below compute with, before the configuration checks the result.
_KINDS_OF_VALUES = {
    "num_hidden_layers": integer(1),
    "full_attention_interval": integer(1),
    "layer_types": Rule(
        "None or a list of names",
        lambda value: value is None or is_list_of(value, lambda item: isinstance(item, str)),
    ),
    "mlp_only_layers": Rule(
        "None or a list of layer numbers",
        lambda value: value is None or is_list_of(value, integer(0).fits),
    ),
    "rope_theta": _POSITIVE_OR_NONE,
    "partial_rotary_factor": _POSITIVE_OR_NONE,
    "rope_parameters": _TABLE,
    "rope_scaling": _TABLE,
    "hidden_act": Rule("a name", lambda value: isinstance(value, str)),
    "max_window_layers": integer(0),
}
_CLASSES = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen3_next": "Qwen3Next"}
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def check_model_type(fields: dict[str, Any]) -> str:
    """The `model_type` of a `config.json`; `ValueError` for one that is not read here."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"`model_type` must be one of {sorted(_DEFAULTS)}. Received: model_type={kind!r}"
        )
    if "text_config" in fields:
        raise ValueError(
            "Models of several kinds of input are not supported. Received: a config.json with "
            "`text_config`"
        )
    return kind


def config_from_hugging_face(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Qwen3NextConfig` from those of a `config.json`.

    Both spellings of the rotary settings (`rope_theta` and `partial_rotary_factor`, or
    `rope_parameters`), of the layers (`layer_types`, or `full_attention_interval`) and of the
    number of experts are read. An absent key means what transformers takes for it.

    Args:
        fields: The dict in `config.json`.

    Returns:
        A dict for `Qwen3NextConfig.from_dict`.

    Raises:
        ValueError: a model type or a setting that this model has no counterpart for.
    """
    kind = check_model_type(fields)
    for name, rule in _KINDS_OF_VALUES.items():
        if name in fields:
            require(rule, name, fields[name])
    given = dict(fields)
    for ours, theirs in (("num_layers", "num_hidden_layers"), ("num_experts", "num_local_experts")):
        if theirs in given:
            given[ours] = given[theirs]
    result = {name: given.get(name, default) for name, default in _DEFAULTS[kind].items()}
    if result["num_key_value_heads"] is None:
        result["num_key_value_heads"] = result["num_attention_heads"]
    if kind == "qwen3":
        result["num_experts"] = 0
    else:
        result["mlp_only_layers"] = tuple(result["mlp_only_layers"] or ())
    if kind != "qwen3_next":
        result["shared_expert_intermediate_size"] = 0
    result |= _GATED if kind == "qwen3_next" else _PLAIN
    result |= _rope(fields, kind)
    result["layer_types"] = _layer_types(fields, kind, result["num_layers"])
    result["ffn_type"] = _ffn_type(fields, result["layer_types"])
    _refuse_unsupported(fields, kind, result["num_layers"])
    return result


def config_to_hugging_face(config: Qwen3NextConfig) -> dict[str, Any]:
    """The `config.json` of a model, for old and new versions of transformers alike.

    `dropout` and `router_aux_loss_scope`, which only training uses, have no counterpart there.

    Args:
        config: `Qwen3NextConfig`.

    Returns:
        A JSON-able dict.

    Raises:
        ValueError: a configuration that none of the published model types can express.
    """
    kind = _model_type(config)
    fields = {"architectures": [_CLASSES[kind] + "ForCausalLM"], "model_type": kind}
    fields |= {name: getattr(config, name) for name in _DEFAULTS[kind]}
    fields["num_hidden_layers"] = fields.pop("num_layers")
    if "mlp_only_layers" in fields:
        fields["mlp_only_layers"] = list(config.mlp_only_layers)
    rope = {"rope_theta": config.rope_theta}
    if kind == "qwen3_next":
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    # Version 4 reads the first spelling and version 5 the second.
    fields |= {**rope, "rope_parameters": {"rope_type": "default", **rope}}
    if kind != "qwen3_moe":
        fields["layer_types"] = list(config.layer_types)
    fields |= {
        "hidden_act": "gelu" if config.ffn_type == "geglu" else "silu",
        "attention_bias": False,
        "use_cache": True,
    }
    if kind != "qwen3_next":
        fields |= {"use_sliding_window": False, "sliding_window": None}
    return fields


def _rope(fields, kind):
    """`rope_theta` and for the hybrid `partial_rotary_factor`, from either spelling."""
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    scaling = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if scaling != "default":
        raise ValueError(
            f"Rotary scaling must be of type 'default'. Received: rope_type={scaling!r}"
        )
    defaults = {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25 if kind == "qwen3_next" else 1.0,
    }
    unknown = sorted(map(str, set(rope) - set(defaults)))
    if unknown:
        raise ValueError(f"`rope_parameters` must hold {list(defaults)}. Received: {unknown}")
    result = {}
    for name, default in defaults.items():
        values = [source[name] for source in (rope, fields) if source.get(name) is not None]
        for value in values:
            require(POSITIVE, name, value)
        if len(set(values)) > 1:
            raise ValueError(f"`{name}` has two values. Received: {name}={values}")
        result[name] = float(values[0]) if values else default
    if kind != "qwen3_next" and result["partial_rotary_factor"] != 1.0:
        raise ValueError(
            f"`partial_rotary_factor` must be 1 for model_type={kind!r}. "
            f"Received: partial_rotary_factor={result['partial_rotary_factor']}"
        )
    return result


def _layer_types(fields, kind, num_layers):
    kinds = fields.get("layer_types")
    if kind == "qwen3_next":
        if kinds is None:
            interval = fields.get("full_attention_interval", 4)
            kinds = [LINEAR if (i + 1) % interval else FULL for i in range(num_layers)]
        return tuple(kinds)
    if kinds is not None and set(kinds) != {FULL}:
        raise ValueError(
            f"`layer_types` must all be {FULL!r} for model_type={kind!r}. "
            f"Received: layer_types={kinds}"
        )
    return (FULL,) * num_layers


def _ffn_type(fields, layer_types):
    activation = fields.get("hidden_act", "silu")
    # In linear layers the published activation also follows the convolution, where ours is SiLU.
    known = ["silu", "swish"] if LINEAR in layer_types else list(_ACTIVATIONS)
    if activation not in known:
        raise ValueError(
            f"`hidden_act` must be one of {known}. Received: hidden_act={activation!r}"
        )
    return _ACTIVATIONS[activation]


def _refuse_unsupported(fields, kind, num_layers):
    for name in ("attention_bias", "quantization_config"):
        if fields.get(name):
            raise ValueError(f"`{name}` is not supported. Received: {name}={fields[name]}")
    window = fields.get("sliding_window", 4096)
    # With `layer_types`, and in the hybrid, nothing but they could make a layer slide.
    free = kind == "qwen3_moe" or (kind == "qwen3" and fields.get("layer_types") is None)
    reached = kind == "qwen3_moe" or num_layers > fields.get("max_window_layers", 28)
    if fields.get("use_sliding_window") and window is not None and free and reached:
        raise ValueError(
            "Sliding windows are not supported. Received: use_sliding_window=True, "
            f"sliding_window={window}"
        )


def _model_type(config):
    """The published type that says all of a configuration; `ValueError` if there is none."""
    problems = _beyond_published(config)
    if all(getattr(config, name) == value for name, value in _GATED.items()):
        kind = "qwen3_next"
        if config.moe_layers and not config.shared_expert_intermediate_size:
            problems.append("shared_expert_intermediate_size=0 with experts")
        if config.ffn_type == "geglu" and LINEAR in config.layer_types:
            problems.append("ffn_type='geglu' with linear attention")
    else:
        kind = "qwen3_moe" if config.moe_layers else "qwen3"
        for name, value in _PLAIN.items():
            if getattr(config, name) != value:
                problems.append(f"{name}={getattr(config, name)!r}")
        if LINEAR in config.layer_types:
            problems.append("layer_types with 'linear_attention'")
        if config.moe_layers and config.shared_expert_intermediate_size:
            size = config.shared_expert_intermediate_size
            problems.append(f"shared_expert_intermediate_size={size}")
    mtp = config.mtp
    if mtp is not None:
        published = mtp.mtp_head_type == "transformer" and mtp.share_weights_across_steps
        if kind != "qwen3_next" or not published:
            problems.append(f"mtp={mtp}")
    if problems:
        raise ValueError(
            f"A model like {kind!r} is nearest, but no published model type can express: "
            + ", ".join(problems)
        )
    return kind


def _beyond_published(config):
    translated = _RULED | set(_DEFAULTS["qwen3_next"])
    return [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(Qwen3NextConfig)
        if field.name not in translated and getattr(config, field.name) != field.default
    ]
