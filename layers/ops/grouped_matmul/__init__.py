"""Matrix products of grouped rows: row r is multiplied with the matrix of its group.

grouped_matmul    `out[r] = rows[r] @ weights[e]` for the rows r of group e
"""

from .api import grouped_matmul

__all__ = ["grouped_matmul"]
