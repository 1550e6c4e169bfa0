"""What a model remembers of the tokens it has absorbed."""

from typing import NamedTuple


class State(NamedTuple):
    """Fixed-size buffers that survive compilation.

    `lengths` `(B,)` int32 counts the tokens of every row. `slots[layer][pass]` is the memory of a
    layer's mixer, an `AttentionSlot` or a `DeltaNetSlot`; a layer that runs several times has one
    slot for each time, never a shared one.
    """

    lengths: object
    slots: tuple
