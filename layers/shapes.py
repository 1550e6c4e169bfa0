"""The static shape of a tensor, as Keras hands it to `build`."""

from typing import Any

Shape = tuple[Any, ...]  # integers, `None` where a dim is unknown
