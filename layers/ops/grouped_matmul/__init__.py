from .api import grouped_matmul

__all__ = ["grouped_matmul"]
