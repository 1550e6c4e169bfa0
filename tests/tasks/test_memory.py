"""What a model leaves behind once it is dropped."""

import gc
import weakref

import keras
import pytest

from tests.support.running import BACKEND
from tests.support.small_models import ONE_LAYER, random_ids, small

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")


def use_and_drop():
    """Weak references to a model that learned for a step and generated, and to a weight."""
    model = small(**ONE_LAYER)
    model.compile("adam")
    model.fit(random_ids(2, 16), verbose=0)
    model.generate(random_ids(1, 5), max_new_tokens=4)
    return weakref.ref(model), weakref.ref(model.trainable_variables[0].value)


def programs():
    """How much of what compiled functions are made of is alive."""
    gc.collect()
    if BACKEND == "jax":
        import jax

        return len(jax.live_arrays())
    import tensorflow as tf

    return sum(isinstance(found, tf.__internal__.FuncGraph) for found in gc.get_objects())


def test_a_dropped_model_leaves_nothing_of_its_own():
    before = programs()
    first = use_and_drop()
    once = programs()
    second = use_and_drop()
    assert programs() <= once
    assert [reference() for reference in (*first, *second)] == [None] * 4
    keras.utils.clear_session()
    assert programs() <= before
