"""Small models that were changed from the same one, and what merges of them are compared with.

base(), changed(seed)     models with all parts that a merge meets
weights_of(model)         {path: float64 array}
probed_logits(model)      logits of its weights, through one program for all models
"""

import functools

import keras
import numpy as np

from qwen3_next.transfer.named_weights import NamedWeights, assign, rebuilt
from tests.support.small_models import TWO_LAYERS, logits_once, random_ids, small

IDS = random_ids(2, 7)


@functools.cache
def base():
    """A DeltaNet with experts and a dense layer with attention; for tests that leave it alone."""
    return with_noise(small(**TWO_LAYERS), 9)  # no weight is zero


@functools.cache
def changed(seed):
    """The base with noise on every weight, most of it small; likewise."""
    return with_noise(base(), seed)


def with_noise(model, seed, size=0.05):
    rng = np.random.default_rng(seed)
    weights = NamedWeights(model)

    def make(row):
        noise = size * rng.standard_t(3, row.shape)
        return (weights[row.path].astype("float64") + noise).astype("float32")

    return rebuilt(model, model.config, make)


def with_weights_of(model, arrays):
    """A model like another with other weights, by path; those that are not named stay."""
    weights = NamedWeights(model)
    return rebuilt(model, model.config, lambda row: arrays.get(row.path, weights[row.path]))


def weights_of(model):
    return {path: array.astype("float64") for path, array in NamedWeights(model).items()}


def bits_of(model):
    return {path: np.array(array).tobytes() for path, array in NamedWeights(model).items()}


def assert_weights(model, expected, tolerance=1e-6):
    """Holds every weight of a model against a `{path: array}`."""
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_allclose(array, expected[path], rtol=tolerance, atol=tolerance)


@functools.cache
def _probe():
    return small(**TWO_LAYERS)


def probed_logits(model):
    probe = _probe()
    assert model.config == probe.config
    variables = {variable.path: variable for variable in probe.weights}
    for path, array in NamedWeights(model).items():
        assign(variables[path], array)
    return logits_once(probe, IDS)


def assert_same_function(model, other):
    np.testing.assert_allclose(probed_logits(model), probed_logits(other), rtol=0, atol=1e-5)


def refused(call, *words):
    """The error of a call, which must be a `ValueError` with these words and leave no model."""
    built = []
    init = keras.Model.__init__

    def noted(self, *args, **kwargs):
        built.append(self)
        init(self, *args, **kwargs)

    keras.Model.__init__ = noted
    try:
        call()
    except ValueError as error:
        assert not built, "a model was built before the refusal"
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return
    finally:
        keras.Model.__init__ = init
    raise AssertionError("nothing was refused")
