"""Depth up-scaling: two overlapping copies of the layers, one model.

original        0 .. n-m-1, then m .. n-1
interlocked_k   k layers of the first, k layers of the second, and so on
"""

import re
from collections.abc import Sequence
from typing import Any

from qwen3_next.config.validation import Rule, integer, is_list_of, require
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.growth.layer_arrangement import (
    arranged_config,
    require_no_think_loop,
    source_path,
)
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt, require_model

_INTERLOCKED = re.compile(r"interlocked_([1-9]\d{0,4})")
_ARRANGEMENT = Rule(
    "'original', 'interlocked_1', 'interlocked_8' (or another number of layers) or a list of "
    "layer numbers",
    lambda value: (
        value == "original" or _INTERLOCKED.fullmatch(value) is not None
        if isinstance(value, str)
        else is_list_of(value, integer(0).fits) and len(value) > 0
    ),
)


def upscaled_layers(
    num_layers: int, arrangement: str = "original", num_dropped: int | None = None
) -> list[int]:
    """The layers of an up-scaled model, each as the layer it is a copy of.

    The first copy lacks the last m layers, the second the first m; 2 (n - m) are left:

        original        0 .. n-m-1, m .. n-1
        interlocked_k   0 .. k-1, m .. m+k-1, k .. 2k-1, m+k .. m+2k-1, ...

    Where k does not divide n - m, the last two blocks are shorter.

    Args:
        num_layers: Layers n of the model.
        arrangement: `"original"`, `"interlocked_1"`, `"interlocked_8"` or another k.
        num_dropped: Layers m that each copy lacks, `None` for a quarter of n.

    Raises:
        ValueError: an unknown arrangement, or more layers dropped than there are.

    Example:

    ```python
    from qwen3_next.transfer.growth.depth_upscaling import upscaled_layers

    assert upscaled_layers(4) == [0, 1, 2, 1, 2, 3]
    assert upscaled_layers(4, "interlocked_1") == [0, 1, 1, 2, 2, 3]
    ```

    Reference: SOLAR 10.7B, arXiv 2312.15166; interlocked, the iDUS project (n = 32, m = 8).
    """
    require(integer(1), "num_layers", num_layers)
    require(_ARRANGEMENT, "arrangement", arrangement)
    if not isinstance(arrangement, str):
        raise ValueError(f"`arrangement` must be a name here. Received: arrangement={arrangement}")
    if num_dropped is None:
        num_dropped = num_layers // 4
    require(integer(0, num_layers - 1), "num_dropped", num_dropped)
    kept = num_layers - num_dropped
    interlocked = _INTERLOCKED.fullmatch(arrangement)
    size = kept if interlocked is None else int(interlocked[1])
    layers = []
    for start in range(0, kept, size):
        block = list(range(start, min(start + size, kept)))
        layers += block + [layer + num_dropped for layer in block]
    return layers


def depth_upscale(
    model: Task,
    arrangement: str | Sequence[int] = "original",
    num_dropped: int | None = None,
    name: str | None = None,
) -> Any:
    """A deeper model of copies of a model's layers, to be trained on from there.

    It does not compute what the model computes: the paper continues the pretraining. Every layer
    has weights of its own, so the copies part as they learn. Embedding, final norm, head and MTP
    modules are those of the model, which stays as it is.

    A copy takes the type of its layer along. In a hybrid, `num_dropped` that is a multiple of
    `full_attention_interval` keeps full attention at its distance in `"original"`.

    Args:
        model: `Qwen3Next` or `Qwen3NextClassifier` without a think loop.
        arrangement: `"original"`, `"interlocked_1"`, `"interlocked_8"` or another number, see
            `upscaled_layers`; or the layers themselves, as numbers of layers of the model.
        num_dropped: Layers that each of the two copies lacks, `None` for a quarter of them, as
            published. Not with a list.
        name: Name of the new model, `None` for Keras' choice.

    Returns:
        A model of the same class.

    Raises:
        ValueError: a model with a think loop, an unknown arrangement, a layer that is not there.

    Example:

    ```python
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.growth.depth_upscaling import depth_upscale

    model = Qwen3Next.from_variant("tiny", vocab_size=64, hidden_size=32, num_layers=4)
    deeper = depth_upscale(model)
    assert deeper.config.num_layers == 6
    assert depth_upscale(model, [0, 1, 2, 3, 3]).config.num_layers == 5
    ```

    Reference: SOLAR 10.7B, Depth Up-Scaling, arXiv 2312.15166.
    """
    require_model("model", model)
    require_no_think_loop("depth_upscale", model.config)
    require(_ARRANGEMENT, "arrangement", arrangement)
    if isinstance(arrangement, str):
        layers = upscaled_layers(model.config.num_layers, arrangement, num_dropped)
    else:
        layers = _listed(arrangement, model.config.num_layers, num_dropped)
    weights = NamedWeights(model)
    config = arranged_config(model.config, layers)
    return rebuilt(model, config, lambda row: weights[source_path(row.path, layers)], name)


def _listed(arrangement, num_layers, num_dropped):
    if num_dropped is not None:
        raise ValueError(
            "`num_dropped` must be None with a list of layers. "
            f"Received: num_dropped={num_dropped}, arrangement={arrangement}"
        )
    inside = integer(0, num_layers - 1)
    fits = Rule(f"a list of layers below {num_layers}", lambda value: all(map(inside.fits, value)))
    require(fits, "arrangement", arrangement)
    return list(arrangement)
