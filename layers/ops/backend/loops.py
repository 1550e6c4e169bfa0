"""The loops and in-place updates that `keras.ops` lacks or gets wrong under XLA.

    scan                  a loop that stacks what its steps return
    get_row, get_rows     read at a computed place
    get_at                read at many computed places
    set_row, set_rows     write at a computed place
    add_to_row            add at a computed place
    scatter_rows          write many rows at computed places
    add_rows              add to many rows at computed places
    zero_after, zeros_after    zeros that are made no earlier than something else
    tied                  a tensor that is not looked at before something else

None of these is meant to be differentiated: the ops that use them bring their own backward pass.
"""

from collections.abc import Callable
from typing import Annotated, Any

import keras
from keras import ops

from ..tensor_types import Tensor
from .platform import platform
from .programs import program
from .sharding import devices

BACKEND = keras.backend.backend()


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: tuple[Tensor, ...],
    xs: tuple[Tensor, ...],
    into: tuple[Tensor, ...],
    reverse: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Runs `carry, ys = step(carry, xs[i])` for every i and stacks the ys.

    `keras.ops.scan` sizes its outputs from the carry on TensorFlow, so it cannot return anything
    of another shape or dtype; here the caller passes the buffers.

    Args:
        step: `step(carry, x) -> (carry, y)`; `carry`, `x` and `y` are tuples of tensors.
        carry: tuple of tensors.
        xs: tuple of tensors with a common leading axis of length N.
        into: tuple of zero tensors, shaped and typed as the stacked ys `(N, ...)`.
        reverse: run from i = N - 1 down to 0; `ys[i]` still belongs to `xs[i]`.

    Returns:
        `(carry, ys)`.
    """
    if BACKEND == "jax":
        import jax

        return jax.lax.scan(step, carry, xs, reverse=reverse)

    length = ops.shape(xs[0])[0]
    if BACKEND == "torch":
        ys: Any = [None] * length
        for i in reversed(range(length)) if reverse else range(length):
            carry, ys[i] = step(carry, tuple(x[i] for x in xs))
        return carry, tuple(ops.stack(y) for y in zip(*ys))

    def body(i, loop):
        carry, ys = loop
        i = length - 1 - i if reverse else i
        carry, y = step(carry, tuple(get_row(x, i) for x in xs))
        return carry, tuple(set_row(buffer, i, row) for buffer, row in zip(ys, y))

    return ops.fori_loop(0, length, body, (carry, into))


def zero_after(x: Tensor, dtype: str) -> Tensor:
    """A `()` zero that is there when `x` is, and that no compiler knows to be zero.

    What is computed with it is neither moved in front of `x` nor merged with what is computed
    without it. Where `x` is spread over devices it is a plain zero: they would all have to be told
    of the one element that is looked at.
    """
    if devices() is not None:
        return ops.zeros((), dtype)
    first = ops.reshape(x, (-1,))[:1]  # none of an empty `x`
    return ops.cast(ops.any((first < 0) & (first > 0)), dtype)


def zeros_after(x: Tensor, shape: tuple, dtype: str) -> Tensor:
    """Zeros to write into, made when `x` is there.

    XLA makes constants of one shape once, at the start of a program, and copies them to wherever a
    loop writes into them: every such buffer would be held from there on.
    """
    return ops.broadcast_to(zero_after(x, dtype), shape)


def tied(x: Tensor, other: Tensor) -> Tensor:
    """`x`, as if it took `other` to know it.

    What is computed with it stays in a loop that changes `other`. XLA would do it once before the
    loop, which is no gain where that is a cast of a large `x` that is read in parts: it would be
    written as a whole. TensorFlow has no public way to say so.
    """
    if BACKEND != "jax":
        return x
    import jax

    return jax.lax.optimization_barrier((x, other))[0]


def set_row(buffer: Tensor, index: Tensor, row: Tensor) -> Tensor:
    """`buffer[index] = row` for a scalar integer tensor `index`."""
    return set_rows(buffer, index, ops.expand_dims(row, 0))


def set_rows(buffer: Tensor, start: Tensor, rows: Tensor, axis: int = 0) -> Tensor:
    """`buffer[start : start + len(rows)] = rows` along `axis`, for a scalar integer tensor."""
    starts: list[Any] = [0] * len(buffer.shape)
    starts[axis] = start
    return ops.slice_update(buffer, starts, rows)


def get_row(buffer: Tensor, index: Tensor) -> Tensor:
    """`buffer[index]` for a scalar integer tensor `index`."""
    if keras.backend.standardize_dtype(buffer.dtype) == "bfloat16" and platform() == "cpu":
        # XLA:CPU slices a float32 copy of the whole buffer, but integers as they are.
        return ops.view(get_row(ops.view(tied(buffer, index), "uint16"), index), "bfloat16")
    if BACKEND == "tensorflow":
        # Indexing and `tf.slice` make XLA take the index for a constant, down to the arguments it
        # was computed from: every new value of those would compile the whole program again.
        return ops.take(buffer, index, axis=0)
    return buffer[index]


def get_rows(buffer: Tensor, start: Tensor, count: int, axis: int = 0) -> Tensor:
    """`buffer[start : start + count]` along `axis`, for a scalar integer tensor `start`."""
    if BACKEND == "tensorflow":
        return ops.take(buffer, start + ops.arange(count, dtype=start.dtype), axis=axis)
    starts: list[Any] = [0] * len(buffer.shape)
    shape = list(ops.shape(buffer))
    starts[axis], shape[axis] = start, count
    return ops.slice(buffer, starts, shape)


def get_at(buffer: Annotated[Tensor, "M ..."], index: Annotated[Tensor, "N"]) -> Tensor:
    """`buffer[index]` `(N, ...)` for integers from 0 to M - 1, which nothing checks."""
    if BACKEND == "jax":
        return buffer.at[index].get(mode="promise_in_bounds")
    return ops.take(buffer, index, axis=0)


def add_to_row(buffer: Tensor, index: Tensor, row: Tensor) -> Tensor:
    """`buffer[index] += row` for a scalar integer tensor `index`."""
    return set_row(buffer, index, get_row(buffer, index) + ops.cast(row, buffer.dtype))


def scatter_rows(
    buffer: Annotated[Tensor, "M ..."],
    index: Annotated[Tensor, "N"],
    rows: Annotated[Tensor, "N ..."],
) -> Annotated[Tensor, "M ..."]:
    """Writes `rows` (N, ...) at `index` (N,) into `buffer` (M, ...); an index of M is dropped.

    Indices other than M must be distinct.
    """
    if BACKEND == "jax":
        return buffer.at[index].set(rows, mode="drop")
    if BACKEND == "tensorflow":
        # Under XLA an index out of range is dropped; TensorFlow's own kernel on the CPU refuses it.
        args = tuple(ops.convert_to_tensor(x) for x in (buffer, index, rows))
        return program(_tensorflow_scatter, *args, jit_compile=True)(*args)
    kept = index < len(buffer)
    return ops.scatter_update(buffer, ops.expand_dims(index[kept], -1), rows[kept])


def add_rows(
    buffer: Annotated[Tensor, "M ..."],
    index: Annotated[Tensor, "N"],
    rows: Annotated[Tensor, "N ..."],
) -> Annotated[Tensor, "M ..."]:
    """Adds `rows` (N, ...) at `index` (N,) to `buffer` (M, ...); an index may come twice.

    For JAX alone, the backend that spreads experts over devices.
    """
    return buffer.at[index].add(ops.cast(rows, buffer.dtype))


def _tensorflow_scatter(buffer, index, rows):
    import tensorflow as tf

    return tf.tensor_scatter_nd_update(buffer, index[:, None], rows)
