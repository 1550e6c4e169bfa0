"""Every layer against the published one, on fixtures made from the transformers library."""

import functools
import json

import keras
import numpy as np
import pytest

from tests.support.layers import (
    FIXTURES,
    KINDS,
    PLACES,
    complete,
    inputs_of,
    subject,
    tolerance,
)
from tests.support.running import assert_close, run, with_weights


@pytest.mark.parametrize("name", PLACES)
def test_layer_agrees_with_the_published_one(name):
    it = subject(name)
    output, *_ = run(it.of_weights, *it.weights, *inputs_of(name))
    assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


@pytest.mark.parametrize("name", PLACES)
def test_a_one_percent_error_in_any_weight_is_seen(name):
    it, rng = subject(name), np.random.default_rng(0)
    for place in range(len(it.weights)):
        wrong = list(it.weights)
        wrong[place] = wrong[place] * rng.choice([0.99, 1.01], wrong[place].shape).astype("float32")
        output, *_ = run(it.of_weights, *wrong, *inputs_of(name))
        with pytest.raises(AssertionError, match="off by"):
            assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


@pytest.mark.portable
@pytest.mark.parametrize("name", ["gated_delta_net_ratio2", "sparse_moe"])
def test_layer_agrees_in_every_mode(name, compiled):
    it = subject(name)
    output, *_ = run(it.of_weights, *it.weights, *inputs_of(name), mode=compiled)
    assert_close(output, FIXTURES[f"{name}/out/hidden_states"], tolerance(name))


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_survives_serialization(name):
    it = subject(name)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(it.layer)))
    clone = keras.saving.deserialize_keras_object(config)
    assert [v.shape for v in clone.weights] == [v.shape for v in it.layer.weights]
    function = with_weights(clone, functools.partial(complete, clone))
    arrays = [*it.weights, *inputs_of(name)]
    assert np.array_equal(run(function, *arrays)[0], run(it.of_weights, *arrays)[0])
