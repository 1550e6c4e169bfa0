"""Weights and configurations on disk: published layouts, presets, safetensors."""
