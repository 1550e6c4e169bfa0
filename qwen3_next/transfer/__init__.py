"""From one model to another: Qwen3 to the hybrid, distillation, growth and merge."""
