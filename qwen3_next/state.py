"""What a model remembers of the tokens it has absorbed."""

from typing import NamedTuple

from keras import ops

from qwen3_next.layers import AttentionSlot
from qwen3_next.layers.ops.sequence import valid_lengths


class State(NamedTuple):
    """Fixed-size buffers that survive compilation.

    `lengths` `(B,)` int32 counts the tokens of every row. `slots[layer][pass]` is the memory of a
    layer's mixer, an `AttentionSlot` or a `DeltaNetSlot`; a layer that runs several times has one
    slot for each time, never a shared one.
    """

    lengths: object
    slots: tuple


def check_room(state, padding_mask):
    """Raises `ValueError` if the attention slots cannot hold the new tokens as well."""
    slots = [slot for passes in state.slots for slot in passes]
    capacities = [slot.keys.shape[1] for slot in slots if isinstance(slot, AttentionSlot)]
    if not capacities:
        return
    needed = int(ops.max(state.lengths + valid_lengths(padding_mask)))
    if needed > min(capacities):
        raise ValueError(
            f"The state has room for {min(capacities)} tokens a row (`max_length` of "
            f"`init_state`). Received: {needed} tokens with the new ones"
        )
