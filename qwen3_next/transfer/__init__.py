"""From one model to another: Qwen3 to the hybrid, distillation, growth and merge.

conversion      `create_hybrid_from_qwen3`, `transfer_qwen3_to_hybrid`, `create_full_hybrid_model`,
                `select_attention_layers`
distillation    `DistillationTrainer`, `store_teacher_logits`
growth          `upcycle_dense_to_moe`, `grow_model_depth`, `grow_model_width`, `depth_upscale`,
                `slice_model`, `create_model_family`
merge           `merge_linear`, `merge_slerp`, `merge_karcher`, `merge_task_arithmetic`,
                `merge_ties`, `merge_dare`, `merge_from_config`
"""
