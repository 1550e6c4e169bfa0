"""Which layers of a think loop run for a row, and which LoRA experts change them.

Both are decided from the tokens of the prompt alone and hold for the whole sequence: a layer's
route in the first iteration, before the layer runs, for all iterations; an expert in every
iteration, before its first layer. With a cache later calls read them there.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .adapters import Adapters
from .expert_router import NO_EXPERT, UNFORCED
from .layer_router import ACTIONS, EXECUTE
from .ops.backend.branches import when
from .ops.backend.seeds import DrawnSeed, folded
from .ops.tensor_types import Tensor


class Routes(NamedTuple):
    """What the layer routers have decided so far.

    Attributes:
        actions: `(B, L)` int32, how often each of the L layers runs for a row: 0, 1 or 2.
        logits: `(B, L, 3)` float32.
        weights: `(B, L, 3)` float32, one-hot forward and with the slopes of a softmax backward, or
            `()` where no gradient reaches the routers.
    """

    actions: Annotated[Tensor, "B L"]
    logits: Annotated[Tensor, "B L 3"]
    weights: Any = ()


class Experts(NamedTuple):
    """Which experts were chosen.

    Attributes:
        chosen: `(B, 1)` or `(B, T)` int32, those of the iteration, or `NO_EXPERT`.
        scores: `(B, 1, N)` or `(B, T, N)` float32, what the router said of all.
        selections: `(B, T, N)` float32, in how many iterations a token thought with each so far.
    """

    chosen: Annotated[Tensor, "B T"]
    scores: Annotated[Tensor, "B T N"]
    selections: Annotated[Tensor, "B T N"]


def check_routing(loop: Any, prompt_mask: Any, segment_ids: Any, route: Any, branch: Any) -> None:
    """Raises `ValueError` for decisions that a loop cannot make or follow."""
    if route is not None and not loop.routers:
        raise ValueError(
            "A `route` needs a loop with layer routers, which has room for a second run of a "
            f"layer. Received: {route=}, routers=[]"
        )
    if branch is not None and loop.expert_router is None:
        raise ValueError(
            f"A `branch` needs a loop with LoRA experts. Received: {branch=}, expert_router=None"
        )
    if prompt_mask is not None and segment_ids is not None:
        raise ValueError(
            "Routers decide for a row: `segment_ids` must be None with a `prompt_mask`. "
            f"Received: {segment_ids=}"
        )


def start_routes(loop: Any, options: Any, given: Any) -> Routes | tuple[()]:
    """The routes before the first iteration, `()` where every layer simply runs."""
    batch, count = ops.shape(given.x)[0], len(loop.layers)
    actions = given.route
    if actions is None and given.cache is not None and loop.routers:
        actions = given.cache.route[0]
    if actions is None:
        if not loop.routers or given.prompt is None:
            return ()
        actions = ops.ones((batch, count), "int32")
    weights: Any = ()
    if options.training and loop.use_gumbel and given.route is None:
        weights = ops.zeros((batch, count, ACTIONS), "float32")
    return Routes(ops.cast(actions, "int32"), _no_logits(batch, count), weights)


def decided(
    loop: Any, given: Any, routes: Routes, place: int, hidden: Tensor, is_first: Any
) -> Routes:
    """The routes with what the router of layer `place` says of the layer's input."""
    if given.prompt is None or not loop.routers:
        return routes
    router = loop.routers[place]
    logits = router(hidden, given.prompt)
    drawn = logits
    if not isinstance(routes.weights, tuple):
        uniform = keras.random.uniform(ops.shape(logits), seed=DrawnSeed(given.route_seeds[place]))
        noise = -ops.log(-ops.log(ops.clip(uniform, 1e-7, 1.0 - 1e-7)))
        drawn = logits + noise / router.temperature
    action = ops.cast(ops.argmax(drawn, axis=-1), "int32")
    if given.warm_routes is not None:  # while the routers warm up every layer runs
        action = ops.where(given.warm_routes, EXECUTE, action)
    found = {"logits": logits}
    if given.route is None:
        found["actions"] = action
    if not isinstance(routes.weights, tuple):
        soft = ops.softmax(drawn)
        hard = ops.cast(action[:, None] == ops.arange(ACTIONS, dtype="int32"), "float32")
        slope = soft - ops.stop_gradient(soft)
        if given.warm_routes is not None:
            slope = ops.where(given.warm_routes, 0.0, slope)
        found["weights"] = hard + slope
    return routes._replace(
        **{
            name: _with_place(getattr(routes, name), place, value, is_first)
            for name, value in found.items()
        }
    )


def run_routed(
    run: Callable[..., Any],
    skip: Callable[[Tensor, int], Any],
    x: Tensor,
    routes: Routes,
    place: int,
    real: Annotated[Tensor, "B T"],
    training: bool = False,
) -> tuple[Any, Any]:
    """What two turns of layer `place` give, the second for rows that repeat it.

    Args:
        run: `run(x, turn, active)`, the output of the layer; rows that are not `active` `(B,)`
            are padding to it, `None` for all rows.
        skip: `skip(x, turn)`, the same nest where no row runs it.
        x: `(B, T, D)`.
        routes: `Routes`.
        place: Which layer.
        real: `(B, T)` bool, true at real tokens.
        training: Whether to compute what no row needs, too: TensorFlow under XLA cannot
            differentiate a choice within a loop.
    """
    if not isinstance(routes.weights, tuple):  # every action has a slope, so every one is computed
        first = run(x, 0, None)
        second = run(first.hidden, 1, None)
        states = ops.stack([x, first.hidden, second.hidden])
        weights = ops.cast(ops.transpose(routes.weights[:, place]), x.dtype)
        # Zeros times what is not chosen are added: exact while that is finite.
        hidden = ops.sum(states * weights[..., None, None], axis=0)
        return first._replace(hidden=hidden), second
    outputs, rows = [], ops.any(real, axis=-1)
    for turn in range(ACTIONS - 1):
        active = routes.actions[:, place] > turn
        x_turn = x

        def run_turn(x=x_turn, turn=turn, active=active):
            return run(x, turn, active)

        def skip_turn(x=x_turn, turn=turn):
            return skip(x, turn)

        needed = ops.any(active & rows)
        outputs.append(run_turn() if training else when(needed, run_turn, skip_turn))
        x = outputs[-1].hidden
    return outputs[0]._replace(hidden=x), outputs[1]


def start_experts(loop: Any, given: Any) -> Experts | tuple[()]:
    """Before the first iteration, `()` where no expert takes part."""
    router = loop.expert_router
    if router is None:
        return ()
    by_token = router.granularity == "token"
    if not by_token and given.prompt is None and given.branch is None and given.cache is None:
        return ()
    batch, length = ops.shape(given.x)[:2]
    shape = (batch, length if by_token else 1)
    return Experts(
        ops.full(shape, NO_EXPERT, "int32"),
        ops.zeros((*shape, router.num_experts), "float32"),
        ops.zeros((batch, length, router.num_experts), "float32"),
    )


def chosen_experts(
    loop: Any, given: Any, experts: Experts, hidden: Tensor, live: Any, number: Any, cache: Any
) -> Experts:
    """The experts of iteration `number`, which begins with `hidden`."""
    router, scores, branch = loop.expert_router, experts.scores, branch_of(given, number)
    if router.granularity == "token":
        scores = router(given.x, hidden)
        chosen = router.select(scores)
        if branch is None and cache is not None:
            branch = cache.forced
        if branch is not None:
            chosen = ops.where(branch[:, None] == UNFORCED, chosen, branch[:, None])
    else:
        if branch is not None:
            chosen = branch[:, None]
        elif given.prompt is not None:
            scores = router(given.x, hidden, given.prompt)
            has_prompt = ops.any(given.prompt, axis=-1, keepdims=True)
            chosen = ops.where(has_prompt, router.select(scores), NO_EXPERT)
        else:
            chosen = cache.branch[:, None]
    if not loop.reselect:
        chosen = _new_if(number == 0, chosen, experts.chosen)
        scores = _new_if(number == 0, scores, experts.scores)
    thinks = given.real if live is None else given.real & live
    added = router.weigh(chosen, None) * ops.cast(thinks, "float32")[..., None]
    return Experts(chosen, scores, experts.selections + added)


def branch_of(given: Any, number: Any) -> Annotated[Tensor, "B"] | None:
    """The experts that are given for the rows in iteration `number`, `None` where none are."""
    branch = given.branch
    if branch is not None and len(branch.shape) == 2:
        return ops.take(branch, number, axis=1)
    return branch


def selections_of(loop: Any, experts: Experts) -> dict[str, Tensor]:
    """How often experts were chosen, by row and by token.

    A row that chooses does so once per iteration, as long as one of its tokens thinks: as often as
    the token that thinks longest.
    """
    by_token = experts.selections
    over_tokens = ops.sum if loop.expert_router.granularity == "token" else ops.max
    return {"selections": over_tokens(by_token, axis=1), "token_selections": by_token}


def adapters_of(
    loop: Any, options: Any, given: Any, experts: Experts | tuple[()], place: int, number: Any
) -> Adapters | None:
    """The experts of layer `place`, weighed as they were chosen."""
    if not experts:
        return None
    router, own = loop.expert_router, loop.experts[place]
    forced = given.branch is not None
    scores = experts.scores if options.training and not forced else None
    weights = router.weigh(experts.chosen, scores)
    if given.warm_experts is not None:  # while the experts warm up all of them take part
        even = ops.cast(experts.chosen != NO_EXPERT, "float32")[..., None] / router.num_experts
        weights = ops.where(given.warm_experts, even * ops.ones_like(weights), weights)
    seeds = given.expert_seeds[place] if given.expert_seeds else {}
    return Adapters(own, weights, folded(seeds, number) if seeds else {})


def _no_logits(batch: Any, count: int) -> Tensor:
    return ops.zeros((batch, count, ACTIONS), "float32")


def _with_place(values: Tensor, place: int, new: Tensor, is_first: Any) -> Tensor:
    """`values (B, L, ...)` with `new` at a layer's place, if it is the first iteration."""
    kept = [values[:, i] for i in range(values.shape[1])]
    kept[place] = _new_if(is_first, new, kept[place])
    return ops.stack(kept, axis=1)


def _new_if(is_first: Any, new: Tensor, old: Tensor) -> Tensor:
    if isinstance(is_first, bool):
        return new if is_first else old
    return ops.where(is_first, new, old)
