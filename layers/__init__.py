"""Keras layers of the Qwen3-Next family. They know nothing of models."""

from .adapters import Adapters
from .decoder_layer import DecoderLayer, DecoderLayerOutput, DropoutSeeds
from .expert_router import ExpertRouter
from .gated_attention import AttentionCache, AttentionUpdate, GatedAttention
from .gated_delta_net import DeltaNetCache, DeltaNetUpdate, GatedDeltaNet
from .gated_rms_norm import GatedRMSNorm
from .halting_unit import Halting, HaltingUnit
from .layer_router import LayerRouter
from .lora_experts import LoRAExperts
from .mixer_context import MixerContext
from .multi_token_prediction import MTPOutput, MultiTokenPrediction
from .partial_rotary_embedding import PartialRotaryEmbedding
from .routed_experts import RoutedExperts
from .sparse_moe import Routing, SparseMoE, load_balancing_loss
from .swiglu import SwiGLU
from .think_loop import ThinkLoop
from .think_types import Thinking, ThinkLoopCache, ThinkLoopOutput, ThinkLoopUpdate
from .token_embedding import TokenEmbedding
from .zero_centered_rms_norm import ZeroCenteredRMSNorm

__all__ = [
    "Adapters",
    "AttentionCache",
    "AttentionUpdate",
    "DecoderLayer",
    "DecoderLayerOutput",
    "DeltaNetCache",
    "DeltaNetUpdate",
    "DropoutSeeds",
    "ExpertRouter",
    "GatedAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "Halting",
    "HaltingUnit",
    "LayerRouter",
    "LoRAExperts",
    "MTPOutput",
    "MixerContext",
    "MultiTokenPrediction",
    "PartialRotaryEmbedding",
    "RoutedExperts",
    "Routing",
    "SparseMoE",
    "SwiGLU",
    "ThinkLoop",
    "ThinkLoopCache",
    "ThinkLoopOutput",
    "ThinkLoopUpdate",
    "Thinking",
    "TokenEmbedding",
    "ZeroCenteredRMSNorm",
    "load_balancing_loss",
]
