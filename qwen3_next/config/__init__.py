"""Configurations: frozen dataclasses, every field checked. Nothing here needs Keras."""

from qwen3_next.config.etd_config import ETDConfig
from qwen3_next.config.hybrid_attention_config import HybridAttentionConfig
from qwen3_next.config.layer_router_config import LayerRouterConfig, RouterAction
from qwen3_next.config.lora_expert_config import LoRAExpertConfig
from qwen3_next.config.model_config import Qwen3NextConfig
from qwen3_next.config.mtp_config import MTPConfig
from qwen3_next.config.transfer_config import CrossArchTransferConfig

__all__ = [
    "CrossArchTransferConfig",
    "ETDConfig",
    "HybridAttentionConfig",
    "LayerRouterConfig",
    "LoRAExpertConfig",
    "MTPConfig",
    "Qwen3NextConfig",
    "RouterAction",
]
