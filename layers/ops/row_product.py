"""Products of single rows with large kernels, which are as fast as the kernels are read.

A compiler for the CPU copies a matrix out of a stack before it multiplies, and then reads the
copy; TensorFlow's runs a product of one row with a reshaped kernel column by column, at a tenth of
the speed; of bfloat16 they take slices from a float32 copy of the whole. What they find written as
one elementwise expression they read in place, in the order in which it lies there, with all cores.
So the product is such an expression, in which S rows of a block of the kernel are multiplied and
added up, and a sum over blocks:

    partial_bo = sum_s x[bS + s] W[bS + s, o]        S terms, read once
    y_o        = sum_b partial_bo                    1/S of the kernel's size

    multiply_row       one row, one kernel, with a backward pass of its own
    partial_products   several rows, each with a kernel out of a stack
    sum_of_blocks      their sums

Several rows that share a kernel are another case. Before such a product a CPU writes the kernel
anew, in the order in which it multiplies, which costs more than to read it; one that is turned
round, `(O, I)`, is multiplied as it lies.

    pays_to_turn            whether that is so here
    multiply_turned         a few rows with a kernel turned round

`python -m benchmarks.run --only decode` is where this counts.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated

from keras import ops
from keras.backend import standardize_dtype

from .backend.autodiff import custom_gradient
from .backend.loops import get_at, tied
from .backend.platform import BACKEND, platform
from .backend.sharding import devices
from .tensor_types import Tensor

# Fewer leave more blocks to be written and read again; more were no faster (of 8, 16, 32, 64).
ROWS = 16
# What leads to an expression XLA computes anew for each of up to 15 terms, but for more of them
# once, for all kernels of a stack.
ROWS_OF_HALVES = 8
# Where a kernel is smaller, there is nothing to gain, and expressions take time to compile.
SMALLEST_KERNEL = 2**16
# Where a kernel that is turned round saves a fifth to a third of a product, on both backends: not
# with 2 rows or 64, nor where it is smaller. Turning it round takes as long as 13 products save.
SMALLEST_TURNED = 2**23
FEW_ROWS = range(3, 33)
PRODUCTS = 16


def pays(rows: tuple[int | None, ...], kernel: Annotated[Tensor, "..."]) -> bool:
    """Whether `multiply_row` is the faster way for `rows` rows, in any shape, on what runs here."""
    one = all(size == 1 for size in rows)
    here = BACKEND in ("tensorflow", "jax")
    large = math.prod(kernel.shape) >= SMALLEST_KERNEL
    return one and here and large and platform() == "cpu" and devices() is None


def pays_to_turn(rows: int, kernel: Annotated[Tensor, "I O"], products: int | None) -> bool:
    """Whether `multiply_turned` is the faster way for so many products of `rows` rows.

    Args:
        rows: Rows of one product.
        kernel: `(I, O)`, float32.
        products: How many products it is turned round for, `None` if it lies so already.
    """
    here = BACKEND in ("tensorflow", "jax")
    large = math.prod(kernel.shape) >= SMALLEST_TURNED
    often = products is None or products >= PRODUCTS
    few = rows in FEW_ROWS
    return few and here and large and often and platform() == "cpu" and devices() is None


def multiply_turned(
    rows: Annotated[Tensor, "... I"], turned: Annotated[Tensor, "O I"]
) -> Annotated[Tensor, "... O"]:
    """`rows @ transpose(turned)`; the large factor comes first."""
    flat = ops.reshape(rows, (-1, rows.shape[-1]))
    product = ops.transpose(ops.matmul(turned, ops.transpose(flat)))
    return ops.reshape(product, (*ops.shape(rows)[:-1], turned.shape[0]))


def multiply_row(row: Annotated[Tensor, "1 I"], kernel: Annotated[Tensor, "I O"]) -> Tensor:
    """`row @ kernel` `(1, O)` in the dtype of `row`, added up in float32."""
    return _differentiable()(row, kernel)


def partial_products(
    rows: Annotated[Tensor, "P I"],
    kernels: Annotated[Tensor, "E I O"],
    index: Annotated[Tensor, "P"] | None = None,
) -> Annotated[Tensor, "P B O"]:
    """`rows[p] @ kernels[index[p]]`, float32, with the sums over blocks of rows left open.

    Args:
        rows: `(P, I)`; kernels are rounded to their dtype as they are read.
        kernels: `(E, I, O)`.
        index: `(P,)` integers from 0 to E - 1, or `None` for 0 to P - 1.
    """
    (count, inner), outer = rows.shape, kernels.shape[2]
    stored, dtype = standardize_dtype(kernels.dtype), standardize_dtype(rows.dtype)
    bits = BACKEND != "torch" and stored == "bfloat16"
    size = math.gcd(inner, ROWS_OF_HALVES if bits else ROWS)
    if bits:  # integers are sliced as they are
        kernels = ops.view(tied(kernels, rows if index is None else index), "uint16")
    kernels = ops.reshape(kernels, (kernels.shape[0], inner // size, size, outer))
    factors = ops.reshape(ops.cast(rows, "float32"), (count, inner // size, size, 1))

    def term(i):
        block = kernels[:, :, i] if index is None else get_at(kernels[:, :, i], index)
        if bits:  # the first half of a float32
            block = ops.view(ops.left_shift(ops.cast(block, "uint32"), 16), "float32")
        if dtype != stored:
            block = ops.cast(block, dtype)
        block = ops.cast(block, "float32")
        return factors[:, :, i] * block

    return functools.reduce(ops.add, map(term, range(size)))


def sum_of_blocks(partial: Annotated[Tensor, "P B O"]) -> Annotated[Tensor, "P O"]:
    """Sums blocks by a product, which compilers do not merge with the expression before it.

    They would make a kernel of a plain sum with all that leads to it: JAX's one that copies its
    inputs first, TensorFlow's one that runs through the expression anew for every output, as it
    does for a product of one row, but not of two.
    """
    copies = 2 if BACKEND == "tensorflow" else 1
    count, blocks, _ = ops.shape(partial)
    ones = ops.ones((count, copies, blocks), "float32")
    return ops.matmul(ones, partial)[:, 0]


@functools.cache
def _differentiable() -> Callable[..., Tensor]:
    def forward(row, kernel):
        product = sum_of_blocks(partial_products(row, kernel[None]))
        return ops.cast(product, row.dtype), (row, kernel)

    def backward(residuals, d_output):
        row, kernel = residuals
        d_row = ops.matmul(d_output, ops.transpose(ops.cast(kernel, row.dtype)))
        return d_row, ops.cast(ops.transpose(row) * d_output, kernel.dtype)

    return custom_gradient(forward, backward)
