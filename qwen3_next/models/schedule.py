"""The schedule of layer passes: which layer runs when, and where the cache of each pass stands.

A model is a row of blocks: a decoder layer that runs once, or a loop of layers that run several
times one after the other. The plain model has only the first kind. A cache holds, in the same
order, one layer cache per block: that of a loop stacks the caches of its iterations.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from qwen3_next.config import Qwen3NextConfig


class LayerPass(NamedTuple):
    """One run of one layer.

    Attributes:
        layer: Index of the decoder layer.
        iteration: Iteration of the loop that it belongs to, 0 outside of one.
        repeat: Whether it is a second run within the iteration, which a layer router asks for.
    """

    layer: int
    iteration: int
    repeat: bool = False


class Block(NamedTuple):
    """Consecutive layers that run together.

    Attributes:
        layers: Their indices.
        loops: Whether they run several times; a block that does not is one layer.
    """

    layers: range
    loops: bool


@dataclass(frozen=True)
class Schedule:
    """The order of layer passes of a configuration.

    Attributes:
        blocks: The blocks of the model, in order.
        max_iterations: The most iterations of the block that loops, 1 where none does.
        repeats: Whether layers of that block may run twice within an iteration: there is a cache
            for the second run, too.

    Example:

    ```python
    from qwen3_next import Qwen3NextConfig
    from qwen3_next.models.schedule import Schedule

    etd = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1}
    schedule = Schedule.from_config(Qwen3NextConfig.from_variant("tiny", num_layers=4, etd=etd))
    assert [one.layer for one in schedule.layer_passes(2)] == [0, 1, 2, 1, 2, 3]
    ```
    """

    blocks: tuple[Block, ...]
    max_iterations: int = 1
    repeats: bool = False

    @classmethod
    def from_config(cls, config: Qwen3NextConfig) -> Self:
        def once(start: int, stop: int) -> list[Block]:
            return [Block(range(layer, layer + 1), False) for layer in range(start, stop)]

        if config.etd is None:
            return cls(tuple(once(0, config.num_layers)))
        ranges = config.etd.get_layer_ranges()
        loop = Block(range(*ranges["think"]), True)
        blocks = (*once(*ranges["encoder"]), loop, *once(*ranges["decoder"]))
        return cls(blocks, config.etd.max_think_iterations, config.etd.use_layer_router)

    def check_iterations(self, iterations: Any) -> None:
        """Raises `ValueError` for a number of iterations that a call must not ask for."""
        if iterations is None:
            return
        if not any(block.loops for block in self.blocks):
            raise ValueError(
                "`think_iterations` needs a model with a think loop, `etd=ETDConfig(...)`. "
                f"Received: think_iterations={iterations!r}, etd=None"
            )
        if type(iterations) is not int or not 1 <= iterations <= self.max_iterations:
            raise ValueError(
                "`think_iterations` must be an integer from 1 to `max_think_iterations`="
                f"{self.max_iterations}. Received: think_iterations={iterations!r}"
            )

    def layer_passes(self, iterations: int | None = None) -> list[LayerPass]:
        """All passes of a run with so many iterations, by default the most, in order, with the
        second runs that a layer router may ask for."""
        self.check_iterations(iterations)
        passes = []
        for block in self.blocks:
            count = (iterations or self.max_iterations) if block.loops else 1
            turns = (False, True) if block.loops and self.repeats else (False,)
            passes += [
                LayerPass(layer, number, turn)
                for number in range(count)
                for layer in block.layers
                for turn in turns
            ]
        return passes
