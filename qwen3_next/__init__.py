"""Qwen3-Next in Keras 3."""

from qwen3_next.backbone import BackboneOutput, Qwen3NextBackbone
from qwen3_next.classifier import Qwen3NextClassifier
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.data import pack, pad, self_distillation_data
from qwen3_next.describe import Description, describe
from qwen3_next.factories import (
    create_qwen3_next,
    create_qwen3_next_with_advanced_features,
    wrap_model_with_mtp,
)
from qwen3_next.generation import Generation
from qwen3_next.language_model import LanguageModelOutput, Qwen3Next
from qwen3_next.mtp_config import MTPConfig
from qwen3_next.optimizers import GroupedAdamW
from qwen3_next.state import State

__version__ = "0.1.0"

__all__ = [
    "BackboneOutput",
    "Description",
    "Generation",
    "GroupedAdamW",
    "LanguageModelOutput",
    "MTPConfig",
    "Qwen3Next",
    "Qwen3NextBackbone",
    "Qwen3NextClassifier",
    "Qwen3NextConfig",
    "State",
    "create_qwen3_next",
    "create_qwen3_next_with_advanced_features",
    "describe",
    "pack",
    "pad",
    "self_distillation_data",
    "wrap_model_with_mtp",
]
