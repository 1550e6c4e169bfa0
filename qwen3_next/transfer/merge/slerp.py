"""Spherical interpolation of two models, tensor by tensor.

m = (sin((1 - t) theta) a + sin(t theta) b) / sin(theta),    cos(theta) = <a, b> / (|a| |b|)
"""

from typing import Any

from qwen3_next.checkpoints.interchange import table_of
from qwen3_next.tasks.task import Task
from qwen3_next.transfer.merge.merge_amounts import FRACTION, Amount, by_weight
from qwen3_next.transfer.merge.mergeable import merged, require_mergeable, weighted_sum
from qwen3_next.transfer.merge.spherical import cosines, slerp_coefficients


def merge_slerp(first: Task, second: Task, t: Amount) -> Any:
    """The model at a fraction `t` of the arc from one model to another, tensor by tensor.

        m = (sin((1 - t) theta) a + sin(t theta) b) / sin(theta)

    theta is the angle between the tensors a and b as vectors. Where they are parallel, opposite or
    zero it is (1 - t) a + t b. `t=0` gives the first model and `t=1` the second, to the bit. Angles
    are float64, sums float32; every weight of the models is treated alike. The models stay as they
    are. `merge_karcher` does the same with more than two.

    Args:
        first: `Qwen3Next` or `Qwen3NextClassifier`.
        second: Another one of the same configuration.
        t: Fraction in [0, 1]: a number, a list of numbers along the decoder layers, or a dict from
            parts (`"experts"`) or regular expressions for paths to either, with `"*"` for all
            others.

    Returns:
        A model of the class, configuration and dtype policy of the first one.

    Raises:
        ValueError: models that differ in class, function or weights, or `t` out of range.

    Reference: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985).

    Example:

    ```python
    from qwen3_next import Qwen3Next, merge_slerp

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_experts": 0}
    first, second = (Qwen3Next.from_variant("tiny", **sizes) for _ in range(2))
    middle = merge_slerp(first, second, t=0.5)
    rising = merge_slerp(first, second, t={"mlp": [0.0, 1.0], "deltanet": 0.3, "*": 0.5})
    assert middle.config == rising.config == first.config
    ```
    """
    require_mergeable({"first": first, "second": second})
    fractions = by_weight("t", t, table_of(first), FRACTION)

    def combine(row, arrays):
        fraction, cosine = fractions[row.path], cosines(arrays)
        if cosine is None:
            return weighted_sum(arrays, (1.0 - fraction, fraction))
        return weighted_sum(arrays, slerp_coefficients(cosine[0, 1], fraction))

    return merged([first, second], combine)
