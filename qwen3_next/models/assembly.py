"""Layers with the dimensions of a configuration."""

from collections.abc import Sequence
from typing import Any

import keras

from qwen3_next.config import ETDConfig, Qwen3NextConfig
from qwen3_next.config.model_config import LINEAR
from qwen3_next.layers import (
    DecoderLayer,
    ExpertRouter,
    GatedAttention,
    GatedDeltaNet,
    HaltingUnit,
    LayerRouter,
    LoRAExperts,
    SparseMoE,
    SwiGLU,
    ThinkLoop,
)
from qwen3_next.layers.initializers import Normal
from qwen3_next.models.think_weights import projection_dims


def make_decoder_layer(
    config: Qwen3NextConfig,
    layer_type: str,
    is_moe: bool,
    *,
    gradient_checkpointing: bool,
    name: str,
    dtype: Any,
) -> DecoderLayer:
    """A `DecoderLayer` of the given kind with the dimensions of a configuration."""
    return DecoderLayer(
        _make_mixer(config, layer_type, dtype),
        _make_moe(config, dtype) if is_moe else make_feed_forward(config, dtype),
        normalization_type=config.normalization_type,
        rms_norm_eps=config.rms_norm_eps,
        dropout=config.dropout,
        gradient_checkpointing=gradient_checkpointing,
        name=name,
        dtype=dtype,
    )


def make_think_loop(
    config: Qwen3NextConfig, etd: ETDConfig, layers: Sequence[DecoderLayer], dtype: Any
) -> ThinkLoop:
    """A `ThinkLoop` around the think layers of a configuration."""
    unit = None
    if etd.adaptive_depth:
        unit = HaltingUnit(
            etd.confidence_threshold, config.initializer_range, name="halting_unit", dtype=dtype
        )
    parts: dict[str, Any] = {}
    if etd.use_layer_router:
        parts["routers"] = [
            _make_layer_router(config, etd.layer_router, f"router_{place}", dtype)
            for place in range(len(layers))
        ]
        parts["use_gumbel"] = etd.layer_router.use_gumbel
        parts["router_warmup_steps"] = etd.router_warmup_steps
    if etd.use_lora_experts:
        parts |= _make_experts(config, etd, dtype)
    return ThinkLoop(
        layers,
        etd.max_think_iterations,
        unit,
        granularity=etd.granularity,
        inference_state=etd.inference_state,
        backprop_iterations=etd.backprop_iterations,
        sample_iterations=etd.sample_iterations,
        warmup_steps=etd.warmup_steps,
        input_injection=etd.input_injection,
        name="think_loop",
        dtype=dtype,
        **parts,
    )


def _make_layer_router(config, router, name, dtype):
    return LayerRouter(
        router.hidden_size,
        router.window_size,
        router.num_windows,
        router.temperature,
        router.execute_bias,
        config.initializer_range,
        name=name,
        dtype=dtype,
    )


def _make_experts(config, etd, dtype):
    """The arguments of a `ThinkLoop` that make up its LoRA experts."""
    expert, std = etd.lora_expert, config.initializer_range
    router = ExpertRouter(
        etd.num_lora_experts,
        expert.granularity,
        expert.bias_update_rate,
        name="expert_router",
        dtype=dtype,
    )

    def make(place, name):
        return LoRAExperts(
            etd.num_lora_experts,
            expert.rank,
            projection_dims(config, name)[1],
            expert.alpha,
            expert.dropout,
            std,
            name=f"experts_{place}_{name}",
            dtype=dtype,
        )

    first, behind = etd.get_layer_ranges()["think"]
    experts = [
        {name: make(layer - first, name) for name in config.adapted_projections(layer)}
        for layer in range(first, behind)
    ]
    return {
        "expert_router": router,
        "experts": experts,
        "reselect": expert.reselect,
        "expert_warmup_steps": etd.expert_warmup_steps,
    }


def _make_mixer(config, layer_type, policy):
    if layer_type == LINEAR:
        return GatedDeltaNet(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            linear_conv_kernel_dim=config.linear_conv_kernel_dim,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            name="linear_attn",
            dtype=policy,
        )
    return GatedAttention(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        output_gate=config.attention_type == "gated_attention",
        gate_bias=config.attention_gate_bias,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        normalization_type=config.normalization_type,
        rms_norm_eps=config.rms_norm_eps,
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
        name="self_attn",
        dtype=policy,
    )


def make_feed_forward(config: Qwen3NextConfig, dtype: Any) -> SwiGLU:
    """A dense feed-forward network."""
    return SwiGLU(
        config.intermediate_size,
        config.ffn_type,
        config.initializer_range,
        name="mlp",
        dtype=dtype,
    )


def _make_moe(config, policy):
    return SparseMoE(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        ffn_type=config.ffn_type,
        initializer_range=config.initializer_range,
        name="mlp",
        dtype=policy,
    )


def check_head(name: str, head: Any, shape: tuple[int, int]) -> None:
    """Raises `ValueError` for a head that is shared but does more than to multiply by a kernel of
    this shape: losses and decoding read the kernel alone."""
    found = tuple(getattr(getattr(head, "kernel", None), "shape", ()))
    bias, activation = getattr(head, "bias", None), getattr(head, "activation", None)
    if found != shape or bias is not None or activation is not keras.activations.linear:
        raise ValueError(
            f"`{name}` must be None or a built Dense with a kernel of shape {shape}, without bias "
            f"and activation. Received: {name}={head}, with a kernel of shape {found or None}, "
            f"{bias=}, {activation=}"
        )
    require_unquantized(name, head)


def require_unquantized(name: str, layer: keras.layers.Layer) -> None:
    """Raises `ValueError` for a layer whose kernel does not hold the numbers it multiplies by."""
    for part in layer._flatten_layers():
        if part.quantization_mode is not None:
            raise ValueError(
                f"`{name}` must not be quantized: its weights are read as they are. "
                f"Received: {part.path} with quantization_mode={part.quantization_mode!r}"
            )


def make_head(config: Qwen3NextConfig, units: int, name: str, dtype: Any) -> keras.layers.Dense:
    """A built head on the hidden states."""
    # Keras files the layers of a model by their class: files know this one as a `Dense`.
    head = keras.layers.Dense(
        units,
        use_bias=False,
        kernel_initializer=Normal(config.initializer_range),
        name=name,
        dtype=dtype,
    )
    # Built here and not by its model, so that its path does not begin with the model's name.
    head.build((None, None, config.hidden_size))
    return head
