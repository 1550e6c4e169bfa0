"""Qwen3-Next in Keras 3."""

from qwen3_next.config import (
    CrossArchTransferConfig,
    ETDConfig,
    HybridAttentionConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    Qwen3NextConfig,
    RouterAction,
)
from qwen3_next.generation.generator import Generation
from qwen3_next.models.backbone import BackboneOutput, Qwen3NextBackbone
from qwen3_next.models.cache import Cache
from qwen3_next.models.description import Description, describe
from qwen3_next.scale.distributing import distribute
from qwen3_next.scale.layout_description import LayoutDescription, describe_layout
from qwen3_next.scale.layouts import layout_map
from qwen3_next.scale.step_description import StepDescription, describe_step
from qwen3_next.tasks.classifier import Qwen3NextClassifier
from qwen3_next.tasks.factories import (
    create_qwen3_next,
    create_qwen3_next_efficient,
    create_qwen3_next_model,
    create_qwen3_next_performance,
    create_qwen3_next_with_advanced_features,
    wrap_model_with_mtp,
    wrap_transformer_with_etd,
)
from qwen3_next.tasks.language_model import LanguageModelOutput, Qwen3Next
from qwen3_next.think.depth_views import depth_text, plot_depth
from qwen3_next.think.layer_profile import LayerProfile
from qwen3_next.think.merging import merge_lora_expert
from qwen3_next.think.path_search import FoundPath, FoundPaths, search_paths
from qwen3_next.think.route_views import plot_expert_shares, plot_router_actions, route_flops
from qwen3_next.think.router_training import (
    FocalLoss,
    RouterTrainer,
    effective_number_weights,
)
from qwen3_next.think.split_profile import profile_layers
from qwen3_next.training.data import pack, pad, self_distillation_data
from qwen3_next.training.optimizers import GroupedAdamW
from qwen3_next.transfer import (
    DistillationTrainer,
    LayerSelection,
    StoredLogits,
    TransferReport,
    create_full_hybrid_model,
    create_hybrid_from_qwen3,
    create_model_family,
    depth_upscale,
    grow_model_depth,
    grow_model_width,
    merge_dare,
    merge_from_config,
    merge_karcher,
    merge_linear,
    merge_slerp,
    merge_task_arithmetic,
    merge_ties,
    select_attention_layers,
    slice_model,
    store_teacher_logits,
    transfer_qwen3_to_hybrid,
    upcycle_dense_to_moe,
    upscaled_layers,
)

__version__ = "0.1.0"

__all__ = [
    "BackboneOutput",
    "Cache",
    "CrossArchTransferConfig",
    "Description",
    "DistillationTrainer",
    "ETDConfig",
    "FocalLoss",
    "FoundPath",
    "FoundPaths",
    "Generation",
    "GroupedAdamW",
    "HybridAttentionConfig",
    "LanguageModelOutput",
    "LayerProfile",
    "LayerRouterConfig",
    "LayerSelection",
    "LayoutDescription",
    "StepDescription",
    "LoRAExpertConfig",
    "MTPConfig",
    "Qwen3Next",
    "Qwen3NextBackbone",
    "Qwen3NextClassifier",
    "Qwen3NextConfig",
    "RouterAction",
    "RouterTrainer",
    "StoredLogits",
    "TransferReport",
    "create_full_hybrid_model",
    "create_hybrid_from_qwen3",
    "create_model_family",
    "create_qwen3_next",
    "create_qwen3_next_efficient",
    "create_qwen3_next_model",
    "create_qwen3_next_performance",
    "create_qwen3_next_with_advanced_features",
    "depth_text",
    "depth_upscale",
    "describe",
    "describe_layout",
    "describe_step",
    "distribute",
    "effective_number_weights",
    "grow_model_depth",
    "grow_model_width",
    "layout_map",
    "merge_dare",
    "merge_from_config",
    "merge_karcher",
    "merge_linear",
    "merge_lora_expert",
    "merge_slerp",
    "merge_task_arithmetic",
    "merge_ties",
    "pack",
    "pad",
    "plot_depth",
    "plot_expert_shares",
    "plot_router_actions",
    "profile_layers",
    "route_flops",
    "search_paths",
    "select_attention_layers",
    "self_distillation_data",
    "slice_model",
    "store_teacher_logits",
    "transfer_qwen3_to_hybrid",
    "upcycle_dense_to_moe",
    "upscaled_layers",
    "wrap_model_with_mtp",
    "wrap_transformer_with_etd",
]
