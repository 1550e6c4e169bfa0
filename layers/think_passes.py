"""The iterations of a think loop, without and with a cache.

run_uncached    a differentiable loop; it ends when all tokens have halted
run_cached      a loop over the caches of the iterations; where all tokens have halted, the
                iterations that are left write into theirs and compute nothing else
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from .decoder_layer import DecoderLayerOutput, both_masks
from .ops.backend.iterate import iterate
from .ops.backend.seeds import folded
from .ops.sequence import running_mean
from .ops.tensor_types import Tensor
from .sparse_moe import Routing, SparseMoE
from .think_routing import (
    adapters_of,
    branch_of,
    chosen_experts,
    decided,
    run_routed,
    selections_of,
    start_experts,
    start_routes,
)
from .think_types import (
    Given,
    Options,
    State,
    Thinking,
    ThinkLoopCache,
    ThinkLoopOutput,
    ThinkLoopUpdate,
    row,
    with_row,
)


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
        new = _write(loop, options, given, state, number, at(left, number))
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
    routing = tuple(one for one in map(_no_routing, loop.layers) if one)
    routes, experts = start_routes(loop, options, given), start_experts(loop, given)
    return State(given.x, halting, routing, routes, experts)


def _iteration(loop, options, given, state, number, count, cache=None):
    """The state after an iteration, and what it leaves of `cache`, its own."""
    hidden, routes, experts = state.hidden, state.routes, state.experts
    live = state.halting.live if state.halting else None
    if loop.injection is not None:
        injected = hidden + loop.injection(given.x)
        moves = number > 0 if live is None else (number > 0) & live[..., None]
        hidden = ops.where(moves, injected, hidden)
    if experts:
        experts = chosen_experts(loop, given, experts, hidden, live, number, cache)
    turns = []
    for place in range(len(loop.layers)):
        run = _layer_runs(loop, options, given, (place, number, live, experts, cache))
        if not routes:
            turns.append((run(hidden), None))
        else:
            routes = decided(loop, given, routes, place, hidden, number == 0)
            skip = _layer_skips(loop, options, given, place, cache)
            turns.append(run_routed(run, skip, hidden, routes, place, given.real, options.training))
        hidden = turns[-1][0].hidden
    halting, sums = state.halting, ()
    if halting:
        probability, sums = _probability(loop, options, given, hidden, cache)
        is_last = number + 1 >= count
        halting = loop.halting_unit.advance(halting, probability, hidden, is_last)
    hidden = ops.cast(hidden, state.hidden.dtype)  # layers may have a policy of their own
    summed = state.routing
    for turn in zip(*turns, strict=True):
        routing = tuple(output.routing for output in turn if output is not None and output.routing)
        summed = (
            keras.tree.map_structure(lambda a, b: a + b, summed, routing) if routing else summed
        )
    left = _left(options, cache, turns, sums, routes, experts, branch_of(given, number))
    return State(hidden, halting, summed, routes, experts), left


def _layer_runs(loop, options, given, around):
    """`run(x, turn, active)` of a layer: its first or second turn, for the active rows."""
    place, number, live, experts, cache = around
    layer, seeds = loop.layers[place], given.seeds[place] if given.seeds else None

    def run(x, turn=0, active=None):
        rows = None if active is None else ops.broadcast_to(active[:, None], ops.shape(x)[:2])
        # A second turn drops other units than the first.
        drawn = number + turn * loop.max_think_iterations
        return layer(
            x,
            padding_mask=both_masks(given.padding_mask, rows),
            segment_ids=given.segment_ids,
            cache=None if cache is None else (cache.repeats if turn else cache.layers)[place],
            lengths=None if cache is None else given.lengths,
            full_output=True,
            replayable=options.replayable,
            updates=both_masks(live, rows),
            dropout_seeds=folded(seeds, drawn) if seeds else None,
            training=options.training,
            adapters=adapters_of(loop, options, given, experts, place, drawn),
        )

    return run


def _layer_skips(loop, options, given, place, cache):
    """`skip(x, turn)`, what a layer gives that no row runs."""
    layer = loop.layers[place]

    def skip(x, turn):
        own: Any = ()
        if cache is not None:
            own = (cache.repeats if turn else cache.layers)[place]
            own = layer.empty_update(own, given.x.shape[1]) if options.replayable else own
        hidden = ops.cast(x, layer.compute_dtype)
        return DecoderLayerOutput(hidden, own, _no_routing(layer))

    return skip


def _write(loop, options, given, state, number, cache):
    """What an iteration leaves of its cache when the residuals of all tokens stand still."""
    hidden, routes, experts = state.hidden, state.routes, state.experts
    if experts:
        still = ops.zeros_like(given.real)
        experts = chosen_experts(loop, given, experts, hidden, still, number, cache)
    turns = []
    for place, layer in enumerate(loop.layers):
        skip = _layer_skips(loop, options, given, place, cache)

        def run(x, turn=0, active=None, layer=layer, place=place):
            rows = None if active is None else ops.broadcast_to(active[:, None], ops.shape(x)[:2])
            left = layer.write(
                x,
                padding_mask=both_masks(given.padding_mask, rows),
                cache=(cache.repeats if turn else cache.layers)[place],
                lengths=given.lengths,
                replayable=options.replayable,
                adapters=adapters_of(loop, options, given, experts, place, number),
            )
            return DecoderLayerOutput(ops.cast(x, layer.compute_dtype), left, _no_routing(layer))

        if routes:
            turns.append(run_routed(run, skip, hidden, routes, place, given.real))
        else:
            turns.append((run(hidden), None))
    _, sums = _probability(loop, options, given, hidden, cache)
    return _left(options, cache, turns, sums, routes, experts, branch_of(given, number))


def _no_routing(layer):
    if not isinstance(layer.mlp, SparseMoE):
        return ()
    zero = ops.zeros((layer.mlp.num_experts,), "float32")
    return Routing(zero, zero, ops.zeros((), "float32"))


def _left(options, cache, turns, sums, routes, experts, branch):
    """What an iteration leaves: its cache, or in a replayable pass its update."""
    first = tuple(first.cache for first, _ in turns)
    second = tuple(second.cache for _, second in turns if second is not None)
    if options.replayable:
        return ThinkLoopUpdate(first, sums, second)
    if cache is None:
        return ()
    route = routes.actions if routes else ()
    chosen = cache.branch
    if experts and not isinstance(chosen, tuple):
        chosen = experts.chosen[:, 0]
    forced = cache.forced
    if branch is not None and not isinstance(forced, tuple):
        forced = branch
    return ThinkLoopCache(first, sums, second, route, chosen, forced)


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
    if state.routes:
        asked = loop.routers and given.prompt is not None
        logits = state.routes.logits if asked else ()
        thinking = thinking._replace(route=state.routes.actions, route_logits=logits)
    if state.experts:
        thinking = thinking._replace(**selections_of(loop, state.experts))
    return ThinkLoopOutput(hidden, left, state.routing, thinking)


def _empty_update(loop, given):
    """Room for the updates of all iterations."""
    cache, length = given.cache, given.x.shape[1]

    def empty(caches):
        return tuple(layer.empty_update(own, length) for layer, own in zip(loop.layers, caches))

    start = row(cache, 0)
    sums = ops.zeros(ops.shape(given.x)[:2], "float32") if loop.by_sequence else ()
    one = ThinkLoopUpdate(empty(start.layers), sums, empty(start.repeats))
    return keras.tree.map_structure(lambda x: ops.repeat(x[None], cache.iterations, axis=0), one)
