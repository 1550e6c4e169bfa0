"""Causal grouped-query attention that never holds a (T, S) matrix.

attention    T queries over S keys, with limits, masks, segments and dropout
"""

from .api import attention

__all__ = ["attention"]
