"""The grouped matrix product as a loop over blocks of rows, and its backward pass.

Every group is cut into blocks of `size` rows, so that the number of blocks follows the rows and
the groups in use, never E. The loop runs over the blocks in use: its trip count is data. A block
may reach past the end of its group; it writes zeros there, overwritten by the next block, which
starts exactly there.
"""

from keras import ops

from ..loops import get_row, get_rows, set_row, set_rows


def block_size(rows, groups):
    """Rows a block: about the mean group, so that neither padding nor re-read weights dominate."""
    if rows is None:
        return 32
    mean = max(1, rows // max(groups, 1))
    return min(64, max(4, 1 << (mean - 1).bit_length()))


def forward(rows, weights, group_sizes, size):
    """`rows (R, D)`, `weights (E, D, F)`, `group_sizes (E,)` -> `(R, F)`."""
    count = ops.shape(rows)[0]
    plan = _plan(count, group_sizes, size)
    rows = _pad(rows, size)

    def body(block, outputs):
        group, start, end = plan(block)
        block_rows = _own_rows(rows, start, end, size)
        return set_rows(outputs, start, block_rows @ get_row(weights, group))

    outputs = ops.zeros((count + size, weights.shape[2]), rows.dtype)
    return ops.fori_loop(0, plan.blocks, body, outputs)[:count]


def backward(rows, weights, group_sizes, d_outputs, size):
    """Gradients of `rows` and `weights`; the latter accumulate in float32."""
    count = ops.shape(rows)[0]
    plan = _plan(count, group_sizes, size)
    rows, d_outputs = _pad(rows, size), _pad(d_outputs, size)

    def body(block, carry):
        d_rows, d_weights = carry
        group, start, end = plan(block)
        d_block = _own_rows(d_outputs, start, end, size)
        d_rows = set_rows(d_rows, start, d_block @ ops.transpose(get_row(weights, group)))
        block_rows = _own_rows(rows, start, end, size)
        d_weight = ops.cast(ops.transpose(block_rows) @ d_block, "float32")
        return d_rows, set_row(d_weights, group, get_row(d_weights, group) + d_weight)

    carry = (ops.zeros_like(rows), ops.zeros(weights.shape, "float32"))
    d_rows, d_weights = ops.fori_loop(0, plan.blocks, body, carry)
    return d_rows[:count], ops.cast(d_weights, weights.dtype)


class _plan:
    """Maps a block number to its group, first row and the end of its group."""

    def __init__(self, count, group_sizes, size):
        self.size = size
        self.ends = ops.cumsum(ops.cast(group_sizes, "int32"))
        self.starts = self.ends - group_sizes
        blocks = (group_sizes + (size - 1)) // size
        self.block_ends = ops.cumsum(blocks)
        self.block_starts = self.block_ends - blocks
        self.blocks = self.block_ends[-1]
        groups = group_sizes.shape[0]
        most = count // size + groups
        if isinstance(count, int):
            most = count // size + min(groups, count)
        self.groups = ops.searchsorted(self.block_ends, ops.arange(most), side="right")

    def __call__(self, block):
        group = get_row(self.groups, block)
        place = block - get_row(self.block_starts, group)
        start = get_row(self.starts, group) + place * self.size
        return group, start, get_row(self.ends, group)


def _own_rows(rows, start, end, size):
    """The rows of the block at `start`, zeros from the end of its group on."""
    own = ops.expand_dims(ops.arange(size) < end - start, -1)
    return ops.where(own, get_rows(rows, start, size), 0.0)


def _pad(rows, size):
    return ops.concatenate([rows, ops.zeros((size, rows.shape[1]), rows.dtype)], axis=0)
