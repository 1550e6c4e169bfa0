from .api import expert_mlp

__all__ = ["expert_mlp"]
