"""Keras layers of the Qwen3-Next family. They know nothing of models."""

from .decoder_layer import DecoderLayer
from .gated_attention import AttentionCache, GatedAttention
from .gated_delta_net import DeltaNetCache, DeltaNetUpdate, GatedDeltaNet
from .gated_rms_norm import GatedRMSNorm
from .multi_token_prediction import MultiTokenPrediction
from .partial_rotary_embedding import PartialRotaryEmbedding
from .routed_experts import RoutedExperts
from .sparse_moe import Routing, SparseMoE, load_balancing_loss
from .swiglu import SwiGLU
from .zero_centered_rms_norm import ZeroCenteredRMSNorm

__all__ = [
    "AttentionCache",
    "DecoderLayer",
    "DeltaNetUpdate",
    "DeltaNetCache",
    "GatedAttention",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "MultiTokenPrediction",
    "PartialRotaryEmbedding",
    "RoutedExperts",
    "Routing",
    "SparseMoE",
    "SwiGLU",
    "ZeroCenteredRMSNorm",
    "load_balancing_loss",
]
