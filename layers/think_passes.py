"""The iterations of a think loop, without and with a cache.

run_uncached    a differentiable loop; it ends when all tokens have halted
run_cached      a loop over the caches of the iterations; where all tokens have halted, the
                iterations that are left write into theirs and compute nothing else
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .ops.backend.iterate import iterate
from .ops.backend.loops import get_row, set_row
from .ops.backend.seeds import folded
from .ops.sequence import running_mean
from .ops.tensor_types import Tensor
from .sparse_moe import Routing, SparseMoE


class ThinkLoopCache(NamedTuple):
    """What a think loop keeps of the tokens it has read, for each of its k iterations.

    Attributes:
        layers: One cache per layer, all buffers with a leading axis of iterations.
        halting_sums: `(k, B)` float32, sums of halting probabilities over the tokens of a row, or
            `()` where tokens halt by themselves.
    """

    layers: tuple
    halting_sums: Any = ()

    @property
    def iterations(self) -> int:
        return keras.tree.flatten(self.layers)[0].shape[0]

    def passes(self) -> list[tuple]:
        """For every layer the caches of its iterations."""
        return [tuple(row(one, n) for n in range(self.iterations)) for one in self.layers]


class ThinkLoopUpdate(NamedTuple):
    """What a replayable pass leaves: `ThinkLoop.commit` turns it into a cache.

    Attributes:
        layers: One update per layer, all tensors with a leading axis of iterations.
        halting_sums: `(k, B, T)` float32, the sums after each token, or `()`.
    """

    layers: tuple
    halting_sums: Any = ()


class Thinking(NamedTuple):
    """How long every token thought; 0 and false at padding.

    Attributes:
        iterations: `(B, T)` int32.
        early_exit: `(B, T)` bool, whether the threshold was reached before the last iteration.
        exit_confidence: `(B, T)` float32, the sum of halting probabilities at the exit, at most 1;
            0 without a halting unit.
        ponder: `(B, T)` float32, iterations plus remainder, through which thinking has a price.
    """

    iterations: Annotated[Tensor, "B T"]
    early_exit: Annotated[Tensor, "B T"]
    exit_confidence: Annotated[Tensor, "B T"]
    ponder: Annotated[Tensor, "B T"]


THINKING_DTYPES = ("int32", "bool", "float32", "float32")


class ThinkLoopOutput(NamedTuple):
    """What a pass through a think loop gives.

    Attributes:
        hidden: `(B, T, D)` in the compute dtype.
        cache: `ThinkLoopCache` with the new tokens, a `ThinkLoopUpdate` in a replayable pass, `()`
            without a cache.
        routing: `Routing` statistics of the layers with a `SparseMoE`, summed over iterations.
        thinking: `Thinking`.
    """

    hidden: Annotated[Tensor, "B T D"]
    cache: ThinkLoopCache | ThinkLoopUpdate | tuple[()]
    routing: tuple[Routing, ...]
    thinking: Thinking


class Options(NamedTuple):
    """What a program is compiled for.

    Attributes:
        iterations: Their number, or `None` where it is computed.
        training: Whether to apply dropout and checkpointing and to weigh the states.
        replayable: Whether to return an update in place of a cache.
    """

    iterations: int | None
    training: bool = False
    replayable: bool = False


class Given(NamedTuple):
    """The tensors of a call.

    Attributes:
        x: `(B, T, D)`.
        padding_mask: `(B, T)` bool or `None`.
        segment_ids: `(B, T)` or `None`.
        lengths: `(B,)` int32 or `None`.
        cache: `ThinkLoopCache` or `None`.
        seeds: The dropout seeds of every layer.
        drawn: `()` int32, the number of iterations where it is computed, else `None`.
    """

    x: Tensor
    padding_mask: Tensor | None
    segment_ids: Tensor | None
    lengths: Tensor | None
    cache: Any
    seeds: tuple = ()
    drawn: Tensor | None = None

    @property
    def real(self) -> Tensor:
        if self.padding_mask is None:
            return ops.ones(ops.shape(self.x)[:2], "bool")
        return self.padding_mask


class State(NamedTuple):
    """What goes from one iteration to the next.

    Attributes:
        hidden: `(B, T, D)`.
        halting: `Halting`, or `()` at a fixed depth.
        routing: One `Routing` per layer that has one, summed so far.
    """

    hidden: Tensor
    halting: Any
    routing: tuple


def run_uncached(loop: Any, options: Options, given: Given) -> ThinkLoopOutput:
    """All iterations over whole sequences."""
    count: Any = given.drawn if options.iterations is None else options.iterations
    most = loop.max_think_iterations if options.iterations is None else options.iterations
    state, going = _start(loop, options, given), _going(loop)

    def step(number, state):
        return _iteration(loop, options, given, state, number, count)[0]

    if most == 1:  # the layers as they are, with no loop around them
        return _output(loop, options, given, step(0, state), count)
    kept, done = loop.backprop_iterations or most, 0
    if options.training and kept < most:
        done = max(count - kept, 0) if options.iterations else ops.maximum(count - kept, 0)
        state = iterate(step, state, done, most - kept, going)
        state = keras.tree.map_structure(ops.stop_gradient, state)
        most = kept
    state = iterate(
        lambda number, state: step(number + done, state), state, count - done, most, going
    )
    return _output(loop, options, given, state, count)


def run_cached(loop: Any, options: Options, given: Given) -> ThinkLoopOutput:
    """All iterations over new tokens behind those in the cache."""
    cache, count = given.cache, given.cache.iterations
    state, left = _start(loop, options, given), cache
    if options.replayable:
        left = _empty_update(loop, given)

    def at(left, number):
        return row(cache if options.replayable else left, number)

    def think(number, state, left):
        state, new = _iteration(loop, options, given, state, number, count, at(left, number))
        return state, with_row(left, number, new)

    def write(number, state, left):
        new = _write(loop, options, given, state, at(left, number))
        return state, with_row(left, number, new)

    if count == 1:
        state, left = think(0, state, left)
        return _output(loop, options, given, state, count, left)
    number, going = ops.zeros((), "int32"), _going(loop)
    number, state, left = _repeat(think, number, state, left, count, going)
    if going is not None:
        _, state, left = _repeat(write, number, state, left, count)
    return _output(loop, options, given, state, count, left)


def _repeat(step, number, state, left, count, going=None):
    def more(number, state, left):
        return (number < count) & going(state) if going is not None else number < count

    def body(number, state, left):
        return number + 1, *step(number, state, left)

    return ops.while_loop(more, body, (number, state, left))


def _going(loop: Any) -> Callable[[State], Tensor] | None:
    return None if loop.halting_unit is None else lambda state: ops.any(state.halting.live)


def _start(loop, options, given):
    count = loop.max_think_iterations if options.iterations is None else options.iterations
    halting: Any = ()
    if loop.halting_unit is not None:
        weighs = options.training or loop.inference_state == "mean"
        halting = loop.halting_unit.start(given.real, given.x if weighs and count > 1 else None)
    moes = (layer.mlp for layer in loop.layers if isinstance(layer.mlp, SparseMoE))
    zeros = (ops.zeros((moe.num_experts,), "float32") for moe in moes)
    routing = tuple(Routing(zero, zero, ops.zeros((), "float32")) for zero in zeros)
    return State(given.x, halting, routing)


def _iteration(loop, options, given, state, number, count, cache=None):
    """The state after an iteration, and what it leaves of `cache`, its own."""
    hidden, routing, left = state.hidden, [], []
    live = state.halting.live if state.halting else None
    if loop.injection is not None:
        injected = hidden + loop.injection(given.x)
        moves = number > 0 if live is None else (number > 0) & live[..., None]
        hidden = ops.where(moves, injected, hidden)
    for place, layer in enumerate(loop.layers):
        output = layer(
            hidden,
            padding_mask=given.padding_mask,
            segment_ids=given.segment_ids,
            cache=None if cache is None else cache.layers[place],
            lengths=None if cache is None else given.lengths,
            full_output=True,
            replayable=options.replayable,
            updates=live,
            dropout_seeds=folded(given.seeds[place], number) if given.seeds else None,
            training=options.training,
        )
        hidden = output.hidden
        left.append(output.cache)
        if output.routing:
            routing.append(output.routing)
    halting, sums = state.halting, ()
    if halting:
        probability, sums = _probability(loop, options, given, hidden, cache)
        is_last = number + 1 >= count
        halting = loop.halting_unit.advance(halting, probability, hidden, is_last)
    hidden = ops.cast(hidden, state.hidden.dtype)  # layers may have a policy of their own
    summed = keras.tree.map_structure(lambda a, b: a + b, state.routing, tuple(routing))
    return State(hidden, halting, summed), _left(options, left, sums)


def _write(loop, options, given, state, cache):
    """What an iteration leaves of its cache when the residuals of all tokens stand still."""
    left = [
        layer.write(
            state.hidden,
            padding_mask=given.padding_mask,
            cache=own,
            lengths=given.lengths,
            replayable=options.replayable,
        )
        for layer, own in zip(loop.layers, cache.layers, strict=True)
    ]
    _, sums = _probability(loop, options, given, state.hidden, cache)
    return _left(options, left, sums)


def _left(options, layers, sums):
    return (ThinkLoopUpdate if options.replayable else ThinkLoopCache)(tuple(layers), sums)


def _probability(loop, options, given, hidden, cache):
    """Halting probabilities `(B, T)`, and their sums for the cache or the update."""
    probability = loop.halting_unit(hidden)
    if not loop.by_sequence:
        return probability, ()
    start = None if cache is None else (cache.halting_sums, given.lengths)
    mean, sums = running_mean(probability, given.padding_mask, given.segment_ids, start)
    return mean, sums if options.replayable else sums[:, -1]


def _output(loop, options, given, state, count, left=()):
    hidden, halting, real = state.hidden, state.halting, given.real
    if not halting:
        zeros = ops.zeros_like(real, "float32")
        iterations = ops.where(real, count, 0)
        ponder = ops.cast(iterations, "float32")
        thinking = Thinking(iterations, ops.zeros_like(real), zeros, ponder)
    else:
        if not isinstance(halting.mean, tuple):
            hidden = ops.cast(halting.mean, hidden.dtype)
        reached = halting.total >= loop.halting_unit.confidence_threshold
        iterations = halting.iterations
        thinking = Thinking(
            iterations=iterations,
            early_exit=real & reached & (iterations < count),
            exit_confidence=ops.minimum(halting.total, 1.0),
            ponder=ops.cast(iterations, "float32") + halting.remainder,
        )
    return ThinkLoopOutput(hidden, left, state.routing, thinking)


def _empty_update(loop, given):
    """Room for the updates of all iterations."""
    cache, length = given.cache, given.x.shape[1]
    layers = [
        layer.empty_update(own, length)
        for layer, own in zip(loop.layers, row(cache, 0).layers, strict=True)
    ]
    sums = ops.zeros(ops.shape(given.x)[:2], "float32") if loop.by_sequence else ()
    one = ThinkLoopUpdate(tuple(layers), sums)
    return keras.tree.map_structure(lambda x: ops.repeat(x[None], cache.iterations, axis=0), one)


def row(stacked: Any, number: Any) -> Any:
    """What stands at place `number` of the leading axes of a nest of tensors."""
    return keras.tree.map_structure(lambda x: get_row(x, number), stacked)


def with_row(stacked: Any, number: Any, new: Any) -> Any:
    """The nest with `new` at place `number`."""
    return keras.tree.map_structure(lambda x, one: set_row(x, number, one), stacked, new)
