"""Shapes in signatures: `query: Annotated[Tensor, "B T H D"]` is a tensor `(B, T, H, D)`.

The letters, the same in every op:

    B  rows of the batch              D  width of a hidden state or of an attention head
    T  tokens (queries)               K  width of a key of the delta rule; experts per token
    S  keys; rows of a tile           V  width of a value of the delta rule; vocabulary
    H  (query or value) heads         F  width of an expert
    G  key heads                      E  experts, groups
    R  value or query heads per key   C  tokens of a chunk or of a block of queries
       head; rows of grouped matrices N  chunks or blocks; tokens without a batch axis

`...` is any number of axes, `T|1` either size. Layers hold what they are called with against it
(`layers.checked_layer`).
"""

from typing import Any

Tensor = Any  # of whatever class the active backend has
