"""From a Qwen3 to the hybrid, and which layers keep their attention."""
