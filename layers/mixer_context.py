"""What a token mixer is told beside its tokens, and what it refuses.

A mixer is a layer with

    call(x, **MixerContext(...)._asdict())   -> output; (output, cache) with a cache;
                                                (output, update) in a replayable pass
    init_cache(batch_size, max_length)       -> cache of empty rows
    commit(cache, update, counts)            -> cache after the first tokens of a replayable pass
    empty_update(cache, length)              -> update with the shapes of one over `length` tokens
    draw_dropout_seed(training)              -> seed tensor, or None where nothing is dropped
    projections()                            -> its projections by name, which adapters may change
"""

from typing import Annotated, Any, NamedTuple

from .adapters import Adapters
from .ops.tensor_types import Tensor


class MixerContext(NamedTuple):
    """The arguments of a mixer's call after `x`, the same for every mixer.

    Attributes:
        padding_mask: `(B, T)` bool, true at real tokens, anywhere in the row; or `None`.
        segment_ids: `(B, T)` integers that tell packed sequences apart, or `None`.
        cache: The mixer's layer cache to continue from, or `None`.
        lengths: `(B,)` int32, tokens already in the cache; `None` without a cache.
        replayable: Whether the pass may be taken back: it then returns an update for `commit`
            in place of the next cache.
        dropout_seed: Seed tensor for the dropout inside the mixer, or `None`.
        training: Whether to apply dropout.
        adapters: `Adapters` of the mixer's projections, or `None`.
    """

    padding_mask: Annotated[Tensor, "B T"] | None = None
    segment_ids: Annotated[Tensor, "B T"] | None = None
    cache: Any = None
    lengths: Annotated[Tensor, "B"] | None = None
    replayable: bool = False
    dropout_seed: Tensor | None = None
    training: bool | None = None
    adapters: Adapters | None = None


def check_context(context: MixerContext, needs_lengths: bool) -> None:
    """Raises `ValueError` for arguments that contradict each other.

    Args:
        context: What the mixer was called with.
        needs_lengths: Whether the mixer's cache is read by position.
    """
    segment_ids, cache, replayable = context.segment_ids, context.cache, context.replayable
    if segment_ids is not None and (cache is not None or replayable):
        raise ValueError(
            "`segment_ids` must be None with a `cache` and in a `replayable` pass: a cache holds "
            f"one sequence per row. Received: segment_ids={segment_ids}, "
            f"cache={_kind(cache)}, {replayable=}"
        )
    if replayable and cache is None:
        raise ValueError(
            f"A `replayable` pass continues a `cache`. Received: {replayable=}, {cache=}"
        )
    if needs_lengths and cache is not None and context.lengths is None:
        raise ValueError(
            "A `cache` needs `lengths`, the tokens that every row of it holds. "
            f"Received: lengths=None, cache={_kind(cache)}"
        )


def _kind(cache: Any) -> str:
    return "None" if cache is None else type(cache).__name__
