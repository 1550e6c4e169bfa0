"""Checks of shapes, as far as they are known before the values are."""

from collections.abc import Sequence

from .tensor_types import Tensor


def require_shape(name: str, x: Tensor | None, expected: Sequence[int | None]) -> None:
    """Raises `ValueError` unless the known dims of `x` are `expected`; `None` there means any."""
    if x is None:
        return
    shape = tuple(x.shape)
    fits = len(shape) == len(expected) and all(
        have is None or want is None or have == want for have, want in zip(shape, expected)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"`{name}` must have shape ({wanted}). Received: {name}.shape={shape}")
