"""The configuration of layer routers (Dr.LLM)."""

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from qwen3_next.config.validation import (
    BOOLEAN,
    NOT_NEGATIVE,
    POSITIVE,
    Config,
    Rule,
    integer,
)


class RouterAction(IntEnum):
    """What a router does with a layer: how often it runs.

    Example:

    ```python
    from qwen3_next import RouterAction

    assert [action.value for action in RouterAction] == [0, 1, 2]
    ```
    """

    SKIP = 0
    EXECUTE = 1
    REPEAT = 2


@dataclass(frozen=True)
class LayerRouterConfig(Config):
    """How the routers of the think layers look like and learn.

    One router per think layer reads the layer's input at the tokens of the prompt, window by
    window, and decides from the mean of the windows' logits whether the row skips the layer, runs
    it, or runs it twice. The decision holds for the whole sequence and for all iterations.

    Args:
        hidden_size: Width of a router's hidden layer.
        window_size: Tokens of a window, where the prompt is short enough for that.
        num_windows: The most windows: a longer prompt is cut into as many of equal size.
        num_actions: 3, the actions of `RouterAction`.
        temperature: Divides the logits.
        use_gumbel: Whether `fit` trains the routers together with the model, by straight-through
            Gumbel-softmax; otherwise labels train them, see `RouterTrainer`.
        execute_bias: What is added to the logit of EXECUTE, so that new routers run every layer.
        compute_budget: Mean passes per think layer that are free, where `use_gumbel` trains.
        budget_weight: Weight in the training loss of the expected passes beyond that.

    Raises:
        ValueError: a value out of range, or an unknown name.

    Reference: Dr.LLM, arXiv 2510.12773; Gumbel-softmax, arXiv 1611.01144.

    Example:

    ```python
    from qwen3_next import ETDConfig, LayerRouterConfig

    router = LayerRouterConfig(hidden_size=128, num_windows=4)
    etd = ETDConfig(1, 2, 1, use_layer_router=True, layer_router=router)
    assert etd.layer_router.num_windows == 4
    ```
    """

    hidden_size: int = 256
    window_size: int = 8
    num_windows: int = 8
    num_actions: int = 3
    temperature: float = 1.0
    use_gumbel: bool = False
    execute_bias: float = 3.0
    compute_budget: float = 1.0
    budget_weight: float = 0.0

    RULES: ClassVar[dict[str, Rule]] = {
        "hidden_size": integer(1),
        "window_size": integer(1),
        "num_windows": integer(1),
        "num_actions": Rule(
            "3 (skip, execute, repeat)", lambda value: type(value) is int and value == 3
        ),
        "temperature": POSITIVE,
        "use_gumbel": BOOLEAN,
        "execute_bias": POSITIVE,
        "compute_budget": NOT_NEGATIVE,
        "budget_weight": NOT_NEGATIVE,
    }

    def __post_init__(self) -> None:
        self.check_fields()
        default = LayerRouterConfig.__dataclass_fields__["compute_budget"].default
        if not self.use_gumbel and self.budget_weight:
            raise ValueError(
                "`budget_weight` is for routers that `fit` trains: it needs `use_gumbel=True`. "
                f"Received: budget_weight={self.budget_weight}, use_gumbel=False"
            )
        if not self.budget_weight and self.compute_budget != default:
            raise ValueError(
                "`compute_budget` needs a `budget_weight` above 0. "
                f"Received: compute_budget={self.compute_budget}, budget_weight=0"
            )
