"""The shapes of what a think loop returns, for functional models."""

from typing import Any

import keras

from .layer_router import ACTIONS
from .shapes import spec_like
from .sparse_moe import SparseMoE
from .think_types import (
    THINKING_DTYPES,
    Thinking,
    ThinkLoopCache,
    ThinkLoopOutput,
    ThinkLoopUpdate,
)


def loop_spec(
    loop: Any,
    x: Any,
    padding_mask: Any = None,
    segment_ids: Any = None,
    cache: Any = None,
    lengths: Any = None,
    replayable: bool = False,
    full_output: bool = False,
    think_iterations: int | None = None,
    training: bool | None = None,
    prompt_mask: Any = None,
    route: Any = None,
    branch: Any = None,
) -> Any:
    """What a call of the loop with these arguments returns, as `KerasTensor`s."""
    count, hidden = loop.checked_iterations(think_iterations), spec_like(x, loop.compute_dtype)
    if cache is None and not full_output:
        return hidden
    moes = (layer.mlp for layer in loop.layers if isinstance(layer.mlp, SparseMoE))
    routing = tuple(moe.compute_output_spec(x, return_routing=True)[1] for moe in moes)
    left: Any = ()
    if cache is not None:
        cache = named_cache(loop, cache)
        loop.check_cache(cache, count, training)
        left = _left_spec(loop, x, cache, lengths, replayable)
    thinking = Thinking(*(keras.KerasTensor(x.shape[:2], dtype) for dtype in THINKING_DTYPES))
    routed = bool(loop.routers) and (cache is not None or prompt_mask is not None)
    rows, layers, router = x.shape[0], len(loop.layers), loop.expert_router
    if routed or route is not None:
        thinking = thinking._replace(route=keras.KerasTensor((rows, layers), "int32"))
    if loop.routers and prompt_mask is not None:
        logits = keras.KerasTensor((rows, layers, ACTIONS), "float32")
        thinking = thinking._replace(route_logits=logits)
    given = (cache, prompt_mask, branch)
    if router is not None and (router.granularity == "token" or any(x is not None for x in given)):
        sizes = (rows, router.num_experts), (*x.shape[:2], router.num_experts)
        by_row, by_token = (keras.KerasTensor(size, "float32") for size in sizes)
        thinking = thinking._replace(selections=by_row, token_selections=by_token)
    return ThinkLoopOutput(hidden, left, routing, thinking)


def named_cache(loop: Any, cache: Any) -> ThinkLoopCache:
    """The cache by its names: a functional model hands over plain tuples."""
    if isinstance(cache, ThinkLoopCache):
        return cache
    template = loop.init_cache(1, 1, think_iterations=1)
    return keras.tree.pack_sequence_as(template, keras.tree.flatten(cache))


def _left_spec(loop, x, cache, lengths, replayable):
    if not replayable:
        return keras.tree.map_structure(spec_like, cache)

    def one(own):
        return keras.tree.map_structure(lambda b: keras.KerasTensor(b.shape[1:], b.dtype), own)

    def stacked(spec):
        return keras.KerasTensor((cache.iterations, *spec.shape), spec.dtype)

    def updates(caches):
        context = {"lengths": lengths, "replayable": True}
        return tuple(
            layer.mixer.compute_output_spec(x, cache=one(own), **context)[1]
            for layer, own in zip(loop.layers, caches)
        )

    sums = keras.KerasTensor(x.shape[:2], "float32") if loop.by_sequence else ()
    update = ThinkLoopUpdate(updates(cache.layers), sums, updates(cache.repeats))
    return keras.tree.map_structure(stacked, update)
