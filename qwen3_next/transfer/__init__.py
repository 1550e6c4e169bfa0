"""From one model to another: Qwen3 to the hybrid, distillation, growth and merge.

conversion      `create_hybrid_from_qwen3`, `transfer_qwen3_to_hybrid`, `create_full_hybrid_model`,
                `select_attention_layers`
distillation    `DistillationTrainer`, `store_teacher_logits`
growth          `upcycle_dense_to_moe`, `grow_model_depth`, `grow_model_width`, `depth_upscale`,
                `slice_model`, `create_model_family`
merge           `merge_linear`, `merge_slerp`, `merge_karcher`, `merge_task_arithmetic`,
                `merge_ties`, `merge_dare`, `merge_from_config`
"""

from qwen3_next.transfer.conversion.hybrid_transfer import (
    create_full_hybrid_model,
    create_hybrid_from_qwen3,
    transfer_qwen3_to_hybrid,
)
from qwen3_next.transfer.conversion.layer_selection import LayerSelection, select_attention_layers
from qwen3_next.transfer.conversion.transfer_report import TransferReport
from qwen3_next.transfer.distill.distillation import DistillationTrainer
from qwen3_next.transfer.distill.stored_logits import StoredLogits, store_teacher_logits
from qwen3_next.transfer.growth.depth_upscaling import depth_upscale, upscaled_layers
from qwen3_next.transfer.growth.net2deeper import grow_model_depth
from qwen3_next.transfer.growth.net2wider import grow_model_width
from qwen3_next.transfer.growth.slicing import create_model_family, slice_model
from qwen3_next.transfer.growth.sparse_upcycling import upcycle_dense_to_moe
from qwen3_next.transfer.merge.dare import merge_dare
from qwen3_next.transfer.merge.karcher import merge_karcher
from qwen3_next.transfer.merge.merge_config import merge_from_config
from qwen3_next.transfer.merge.slerp import merge_slerp
from qwen3_next.transfer.merge.task_arithmetic import merge_linear, merge_task_arithmetic
from qwen3_next.transfer.merge.ties import merge_ties

__all__ = [
    "DistillationTrainer",
    "LayerSelection",
    "StoredLogits",
    "TransferReport",
    "create_full_hybrid_model",
    "create_hybrid_from_qwen3",
    "create_model_family",
    "depth_upscale",
    "grow_model_depth",
    "grow_model_width",
    "merge_dare",
    "merge_from_config",
    "merge_karcher",
    "merge_linear",
    "merge_slerp",
    "merge_task_arithmetic",
    "merge_ties",
    "select_attention_layers",
    "slice_model",
    "store_teacher_logits",
    "transfer_qwen3_to_hybrid",
    "upcycle_dense_to_moe",
    "upscaled_layers",
]
