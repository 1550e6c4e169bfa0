from .api import correct, cross_entropy, linear_cross_entropy

__all__ = ["correct", "cross_entropy", "linear_cross_entropy"]
