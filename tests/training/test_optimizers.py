"""AdamW with a learning rate of its own for each group of weights."""

import keras
import numpy as np
import pytest

from qwen3_next import GroupedAdamW
from tests.support.mtp_models import LIGHT
from tests.support.running import CHEAPEST_STEPS
from tests.support.small_models import random_ids, small

IDS = random_ids(4, 20)


def test_groups_learn_at_their_own_rates():
    model = small(**LIGHT)
    before = {v.path: keras.ops.convert_to_numpy(v.value) for v in model.trainable_variables}
    rates = {"mlp": 0.5, "lm_head": 0.0, "self_attn/q_proj": 2.0}
    optimizer = GroupedAdamW(1e-3, rates, weight_decay=0.0, epsilon=1e-12)
    model.compile(optimizer, **CHEAPEST_STEPS)
    model.fit(IDS, batch_size=4, verbose=0)
    moved = {
        v.path: np.abs(keras.ops.convert_to_numpy(v.value) - before[v.path]).max()
        for v in model.trainable_variables
    }
    layer = "model/layers_0"
    np.testing.assert_allclose(moved[f"{layer}/mlp/down_proj/kernel"], 5e-4, rtol=1e-2)
    assert moved["lm_head/kernel"] == 0
    np.testing.assert_allclose(moved[f"{layer}/self_attn/q_proj/kernel"], 2e-3, rtol=1e-2)
    np.testing.assert_allclose(moved[f"{layer}/self_attn/k_proj/kernel"], 1e-3, rtol=1e-2)
    assert GroupedAdamW.from_config(optimizer.get_config()).multipliers == rates


def test_weight_decay_is_that_of_adamw():
    ours, keras_own = (keras.Variable(np.array([1.0, -2.0], "float32"), name="w") for _ in "ab")
    gradient = [keras.ops.convert_to_tensor(np.array([0.3, 0.1], "float32"))]
    for optimizer, variable in (
        (GroupedAdamW(0.1, weight_decay=0.5), ours),
        (keras.optimizers.AdamW(0.1, weight_decay=0.5), keras_own),
    ):
        optimizer.build([variable])
        for _ in range(3):
            optimizer.apply(gradient)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(ours.value), keras.ops.convert_to_numpy(keras_own.value), 1e-6
    )


@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_excluded_is_not_decayed(by_name):
    left, shrunk = (keras.Variable([2.0], name=name) for name in ("left", "shrunk"))
    optimizer = GroupedAdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(
        **({"var_names": ["^l"]} if by_name else {"var_list": [left]})
    )
    optimizer.build([left, shrunk])
    optimizer.apply([keras.ops.zeros((1,))] * 2)
    assert (float(left[0]), round(float(shrunk[0]), 6)) == (2.0, 1.9)


def test_bad_optimizer_groups_are_named():
    with pytest.raises(ValueError, match="experts"):
        GroupedAdamW(1e-3, {"experts": -1.0})
    with pytest.raises(ValueError, match="no_such_layer"):
        GroupedAdamW(1e-3, {"no_such_layer": 2.0}).build([keras.Variable([1.0], name="w")])
