"""Divergence and gradient of one chunk of rows after the other.

A kind of teacher is two functions of the logits of a chunk `(R, V)`, the student's and divided by
the temperature, and of what the teacher gives of it:

    divergence(logits, *teacher)       (R,)     KL(p || q)
    probabilities(logits, *teacher)    (R, V)   what q is to become: d KL / d logits is q minus this
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from ..backend.autodiff import custom_gradient
from ..backend.loops import scan
from ..tensor_types import Tensor

NOWHERE = -1e30  # a logit without probability


class Kind(NamedTuple):
    divergence: Callable[..., Tensor]
    probabilities: Callable[..., Tensor]


@functools.cache
def differentiable(kind: Kind, num_by_row: int, temperature: float) -> Callable[..., Any]:
    """`f(kernel, *shared, hidden, mask, *by_row) -> losses`, all but the first in chunks of rows.

    Args:
        kind: What the teacher gives.
        num_by_row: How many tensors it gives by row.
        temperature: By which logits are divided.
    """

    def forward(*inputs):
        kernel, shared, xs = _split(inputs, num_by_row)

        def step(carry, xs):
            logits, real, teacher = _of_chunk(xs, kernel, shared, temperature)[1:]
            found = temperature**2 * kind.divergence(logits, *teacher)
            return carry, (ops.where(real, found, 0.0),)

        _, (losses,) = scan(step, (), xs, (ops.zeros_like(xs[1], "float32"),))
        return losses, inputs

    def backward(inputs, d_losses):
        kernel, shared, xs = _split(inputs, num_by_row)

        def step(carry, xs):
            (d_kernel,), (d_loss, *xs) = carry, xs
            rows, logits, real, teacher = _of_chunk(xs, kernel, shared, temperature)
            missing = ops.softmax(logits) - kind.probabilities(logits, *teacher)
            d_loss = ops.where(real, d_loss, 0.0)[:, None]
            d_logits = ops.cast(temperature * d_loss * missing, kernel.dtype)  # (R, V)
            d_kernel = d_kernel + ops.cast(ops.transpose(rows) @ d_logits, "float32")
            return (d_kernel,), (d_logits @ ops.transpose(kernel),)

        carry = (ops.zeros(kernel.shape, "float32"),)
        (d_kernel,), (d_hidden,) = scan(step, carry, (d_losses, *xs), (ops.zeros_like(xs[0]),))
        d_kernel = ops.cast(d_kernel, kernel.dtype)
        return d_kernel, *(None for _ in shared), d_hidden, *(None for _ in xs[1:])

    return custom_gradient(forward, backward)


def _split(inputs: Sequence[Tensor], num_by_row: int) -> tuple[Tensor, list[Tensor], tuple]:
    kernel, *shared = inputs[: -(num_by_row + 2)]
    return kernel, shared, tuple(inputs[-(num_by_row + 2) :])


def _of_chunk(xs, kernel, shared, temperature):
    """The rows of a chunk, their logits over the temperature, which count, and the teacher's."""
    rows, real, *teacher = xs
    # Zeros where a row does not count: a product with 0 would keep what is not finite.
    rows, *teacher = (ops.where(real[:, None], x, ops.zeros_like(x)) for x in (rows, *teacher))

    def scaled(rows, kernel):
        return ops.cast(rows @ kernel, "float32") / temperature  # (R, V)

    if shared:
        teacher = [scaled(*teacher, *shared)]
    return rows, scaled(rows, kernel), real, teacher


def _divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    logs, teacher_logs = ops.log_softmax(logits), ops.log_softmax(teacher_logits)
    return ops.sum(ops.exp(teacher_logs) * (teacher_logs - logs), axis=-1)


def _probabilities(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    del logits
    return ops.softmax(teacher_logits)


def _top_divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    total = ops.logsumexp(logits, axis=-1)
    logs = ops.take_along_axis(logits, ids, axis=-1) - total[:, None]  # (R, n)
    found = ops.sum(ops.exp(log_probs) * (log_probs - logs), axis=-1)
    rest = _rest(log_probs, logits.shape[1])
    log_rest = ops.logsumexp(_written(logits, ids, NOWHERE), axis=-1) - total
    return found + rest * (ops.log(ops.maximum(rest, 1e-30)) - log_rest)


def _top_probabilities(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """The teacher's, with the rest shared as the student shares its own."""
    rest = _rest(log_probs, logits.shape[1])[:, None]
    others = rest * ops.softmax(_written(logits, ids, NOWHERE))
    return _written(others, ids, ops.exp(log_probs))


def _rest(log_probs, vocab_size):
    """What the n leave: nothing, to the bit, where they are the whole vocabulary."""
    rest = ops.maximum(1.0 - ops.sum(ops.exp(log_probs), axis=-1), 0.0)
    return ops.where(ops.equal(ops.shape(log_probs)[1], vocab_size), 0.0, rest)


def _written(x, ids, values):
    """`x` `(R, V)` with `values`, a number or `(R, n)`, at `ids` `(R, n)` of each row."""
    rows = ops.zeros_like(ids) + ops.arange(ids.shape[0], dtype="int32")[:, None]
    places = ops.stack([ops.ravel(rows), ops.ravel(ids)], axis=1)
    values = ops.zeros_like(ids, x.dtype) + ops.cast(values, x.dtype)
    return ops.scatter_update(x, places, ops.ravel(values))


LINEAR = Kind(_divergence, _probabilities)
TOP = Kind(_top_divergence, _top_probabilities)
