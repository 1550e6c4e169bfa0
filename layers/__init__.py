"""Keras layers of the Qwen3-Next family. They know nothing of models."""

from .decoder_layer import DecoderLayer, DecoderLayerOutput
from .gated_attention import AttentionCache, AttentionUpdate, GatedAttention
from .gated_delta_net import DeltaNetCache, DeltaNetUpdate, GatedDeltaNet
from .gated_rms_norm import GatedRMSNorm
from .mixer_context import MixerContext
from .multi_token_prediction import MTPOutput, MultiTokenPrediction
from .partial_rotary_embedding import PartialRotaryEmbedding
from .routed_experts import RoutedExperts
from .sparse_moe import Routing, SparseMoE, load_balancing_loss
from .swiglu import SwiGLU
from .token_embedding import TokenEmbedding
from .zero_centered_rms_norm import ZeroCenteredRMSNorm

__all__ = [
    "AttentionCache",
    "AttentionUpdate",
    "DecoderLayer",
    "DecoderLayerOutput",
    "DeltaNetCache",
    "DeltaNetUpdate",
    "GatedAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "MTPOutput",
    "MixerContext",
    "MultiTokenPrediction",
    "PartialRotaryEmbedding",
    "RoutedExperts",
    "Routing",
    "SparseMoE",
    "SwiGLU",
    "TokenEmbedding",
    "ZeroCenteredRMSNorm",
    "load_balancing_loss",
]
