"""What goes in and out of a think loop and from one iteration to the next."""

from typing import Annotated, Any, NamedTuple

import keras
from keras import ops

from .ops.backend.loops import get_row, set_row
from .ops.tensor_types import Tensor
from .sparse_moe import Routing


class ThinkLoopCache(NamedTuple):
    """What a think loop keeps of the tokens it has read, for each of its k iterations.

    Attributes:
        layers: One cache per layer, all buffers with a leading axis of iterations.
        halting_sums: `(k, B)` float32, sums of halting probabilities over the tokens of a row, or
            `()` where tokens halt by themselves.
        repeats: With layer routers one more cache per layer, of the second run within an iteration.
        route: With layer routers `(k, B, L)` int32, the same for all iterations: how often each of
            the L layers runs for a row.
        branch: With LoRA experts that rows choose `(k, B)` int32, the expert of each iteration, or
            -1 for none.
        forced: With LoRA experts that tokens pick `(k, B)` int32, the expert that was given for a
            row in each iteration, -1 for none, or `UNFORCED` where its tokens pick.
    """

    layers: tuple
    halting_sums: Any = ()
    repeats: tuple = ()
    route: Any = ()
    branch: Any = ()
    forced: Any = ()

    @property
    def iterations(self) -> int:
        return keras.tree.flatten(self.layers)[0].shape[0]

    def passes(self) -> list[tuple]:
        """For every layer the caches of its iterations, and behind them those of its repeats."""
        found = []
        for place, one in enumerate(self.layers):
            both = (one, self.repeats[place]) if self.repeats else (one,)
            found.append(tuple(row(own, n) for own in both for n in range(self.iterations)))
        return found


class ThinkLoopUpdate(NamedTuple):
    """What a replayable pass leaves: `ThinkLoop.commit` turns it into a cache.

    Attributes:
        layers: One update per layer, all tensors with a leading axis of iterations.
        halting_sums: `(k, B, T)` float32, the sums after each token, or `()`.
        repeats: With layer routers one update per layer, of the second run within an iteration.
    """

    layers: tuple
    halting_sums: Any = ()
    repeats: tuple = ()


class Thinking(NamedTuple):
    """How long every token thought; 0 and false at padding.

    Attributes:
        iterations: `(B, T)` int32.
        early_exit: `(B, T)` bool, whether the threshold was reached before the last iteration.
        exit_confidence: `(B, T)` float32, the sum of halting probabilities at the exit, at most 1;
            0 without a halting unit.
        ponder: `(B, T)` float32, iterations plus remainder, through which thinking has a price.
        route: `(B, L)` int32, how often each of the L think layers runs for a row in an iteration,
            or `()` where nothing was routed.
        route_logits: `(B, L, 3)` float32, the logits of skipping, running and repeating a layer,
            where the routers were asked, else `()`.
        selections: `(B, N)` float32, how often a row, or its tokens, chose each LoRA expert, or
            `()`.
        token_selections: `(B, T, N)` float32, in how many iterations a token thought with each, or
            `()`: where rows choose, with what its row chose.
    """

    iterations: Annotated[Tensor, "B T"]
    early_exit: Annotated[Tensor, "B T"]
    exit_confidence: Annotated[Tensor, "B T"]
    ponder: Annotated[Tensor, "B T"]
    route: Any = ()
    route_logits: Any = ()
    selections: Any = ()
    token_selections: Any = ()


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
        prompt: `(B, T)` bool, true at the real tokens of the prompt, or `None` without one.
        route: `(B, L)` int32, a route given by hand, or `None`.
        branch: `(B,)` or `(B, k)` int32, experts given by hand, or `None`.
        route_seeds: A seed per router that draws its action.
        expert_seeds: The dropout seeds of every layer's experts, by projection.
        warm_routes: `()` bool, whether every layer runs all the same, or `None` for no.
        warm_experts: `()` bool, whether all experts take part, or `None` for no.
    """

    x: Tensor
    padding_mask: Tensor | None
    segment_ids: Tensor | None
    lengths: Tensor | None
    cache: Any = None
    seeds: tuple = ()
    drawn: Tensor | None = None
    prompt: Tensor | None = None
    route: Tensor | None = None
    branch: Tensor | None = None
    route_seeds: tuple = ()
    expert_seeds: tuple = ()
    warm_routes: Tensor | None = None
    warm_experts: Tensor | None = None

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
        routes: `Routes`, or `()` where every layer simply runs.
        experts: `Experts`, or `()` where none takes part.
    """

    hidden: Tensor
    halting: Any
    routing: tuple
    routes: Any
    experts: Any


def row(stacked: Any, number: Any) -> Any:
    """What stands at place `number` of the leading axes of a nest of tensors."""
    return keras.tree.map_structure(lambda x: get_row(x, number), stacked)


def with_row(stacked: Any, number: Any, new: Any) -> Any:
    """The nest with `new` at place `number`."""
    return keras.tree.map_structure(lambda x, one: set_row(x, number, one), stacked, new)
