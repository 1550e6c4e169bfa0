"""AdamW with a learning rate of its own for groups of variables."""

import re
from typing import Any

import keras
from keras import ops

from qwen3_next.config.validation import NOT_NEGATIVE, Rule, require

GROUPS = {
    "experts": r"(^|/)experts/",
    "router": r"(^|/)mlp/gate/",
}
# Rates of decay and norm weights around 1 have no reason to shrink towards 0; zero-centred norm
# weights do, towards a scale of 1, and are decayed like the rest.
_RATE = Rule(
    "a float of at least 0, a schedule or a function",
    lambda value: callable(value) or (isinstance(value, float) and NOT_NEGATIVE.fits(value)),
)
_MULTIPLIERS = Rule(
    f"None or a dict whose keys are {sorted(GROUPS)} or regular expressions",
    lambda value: value is None or (isinstance(value, dict) and all(map(_is_pattern, value))),
)
NOT_DECAYED = r"(^|/)(A_log|dt_bias|scale|linear_attn/norm/weight)$"


@keras.saving.register_keras_serializable(package="qwen3_next")
class GroupedAdamW(keras.optimizers.Adam):
    """AdamW whose learning rate is multiplied by a factor for groups of variables.

    A variable's rate is `learning_rate * multipliers[group]`, its decoupled weight decay uses the
    same rate. A group is `"experts"`, `"router"`, or a regular expression searched in the
    variable's path; a variable takes the first group that matches and a factor of 1 without one.

    Args:
        learning_rate: Float or schedule, as for `keras.optimizers.AdamW`.
        multipliers: Dict from group to factor, at least 0.
        weight_decay: Decoupled weight decay. Decay rates of the delta rule and plain norm weights
            are left out, and what `exclude_from_weight_decay` names.
        **kwargs: As for `keras.optimizers.Adam`, such as `gradient_accumulation_steps`.

    Raises:
        ValueError: a factor below 0, or a group that matches no variable.

    Reference: Decoupled Weight Decay Regularization, arXiv 1711.05101.

    Example:

    ```python
    import keras
    from qwen3_next import GroupedAdamW

    table = keras.Variable([1.0, 2.0], name="table")
    optimizer = GroupedAdamW(1e-3, {"table": 0.5}, weight_decay=0.0)
    optimizer.build([table])
    optimizer.apply([keras.ops.ones((2,))])
    assert abs(float(table[0]) - (1.0 - 0.5e-3)) < 1e-5
    ```
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        multipliers: dict[str, float] | None = None,
        weight_decay: float | None = 0.004,
        **kwargs: Any,
    ):
        require(_RATE, "learning_rate", learning_rate)
        require(_MULTIPLIERS, "multipliers", multipliers)
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.multipliers = dict(multipliers or {})
        self.decoupled_decay = weight_decay
        for group, factor in self.multipliers.items():
            require(NOT_NEGATIVE, f"multipliers[{group!r}]", factor)
        if weight_decay is not None:
            require(NOT_NEGATIVE, "weight_decay", weight_decay)

    def build(self, variables):
        super().build(variables)
        for group in self.multipliers:
            if not any(_matches(group, variable.path) for variable in variables):
                raise ValueError(f"The group matches no variable. Received: multipliers[{group!r}]")

        # By index, as the moments are kept: on TensorFlow an update gets a variable without a path.
        self._factors = [self._factor(variable.path) for variable in variables]
        self._decayed = [self._is_decayed(variable) for variable in variables]

    def _factor(self, path):
        matching = (f for group, f in self.multipliers.items() if _matches(group, path))
        return next(matching, 1.0)

    def _is_decayed(self, variable):
        # Keras' own asks whether `exclude_from_weight_decay` named it.
        return not re.search(NOT_DECAYED, variable.path) and self._use_weight_decay(variable)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        learning_rate = learning_rate * self._factors[index]
        if self.decoupled_decay and self._decayed[index]:
            shrink = ops.cast(1.0 - learning_rate * self.decoupled_decay, variable.dtype)
            self.assign(variable, variable * shrink)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        return {
            **super().get_config(),
            "multipliers": self.multipliers,
            "weight_decay": self.decoupled_decay,
        }


def _is_pattern(group):
    try:
        return isinstance(group, str) and re.compile(group) is not None
    except re.error:
        return False


def _matches(group, path):
    return re.search(GROUPS.get(group, group), path) is not None
