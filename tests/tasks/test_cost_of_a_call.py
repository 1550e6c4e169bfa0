"""What a call costs is counted: traces of the backbone, and on JAX compiled programs."""

import contextlib

import keras
import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3NextClassifier
from tests.support.mtp_models import LIGHT
from tests.support.running import BACKEND
from tests.support.small_models import TWO_LAYERS, logits_once, random_ids, small

IDS = random_ids(2, 12)
pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")


@contextlib.contextmanager
def traces(model):
    """Collects one entry per call of the backbone: within a compiled function, per trace."""
    kind, found = type(model.backbone), []
    original = kind.call

    def call(self, *args, **kwargs):
        found.append(self)
        return original(self, *args, **kwargs)

    kind.call = call
    try:
        yield found
    finally:
        kind.call = original


@pytest.fixture(scope="module")
def model():
    model = small(**LIGHT)
    model.compile("sgd")
    return model


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.fit(IDS, verbose=0),
        lambda model: model.evaluate(IDS, verbose=0),
        lambda model: model.predict(IDS, verbose=0),
        lambda model: model.train_on_batch(IDS),
        lambda model: model.test_on_batch(IDS),
        lambda model: model.predict_on_batch(IDS),
    ],
    ids=["fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"],
)
def test_a_second_call_traces_nothing(model, call):
    call(model)
    with traces(model) as found:
        call(model)
    assert not found


@pytest.mark.skipif(BACKEND != "tensorflow", reason="on JAX Keras builds what was compiled first")
def test_a_first_step_is_traced_once():
    model = small(**LIGHT)
    model.compile("adamw")  # which has variables to make
    with traces(model) as found:
        model.train_on_batch(IDS)
    assert len(found) == 1


def test_a_second_extension_of_a_cache_traces_nothing(model):
    cache = model.init_cache(2, 16)
    model.extend(IDS, cache)
    with traces(model) as found:
        model.extend(IDS, cache)
    assert not found


def test_forty_prompt_lengths_share_a_few_programs(model):
    with traces(model) as found:
        for length in range(1, 41):
            model.generate([random_ids(length)], max_new_tokens=4)
    # Chunks of 16, 24, 32 and 48 tokens; 64 places are enough for all of them.
    widths = 4
    assert 0 < len(found) <= 2 * widths
    with traces(model) as found:
        for length in range(1, 41):
            model.generate([random_ids(length)], max_new_tokens=4)
    assert not found


@pytest.mark.skipif(BACKEND != "jax", reason="listens to JAX")
def test_a_second_eager_call_compiles_nothing():
    import jax

    model, compiled = small(**TWO_LAYERS), []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    model(IDS)
    assert compiled
    compiled.clear()
    model(IDS)
    assert not compiled


@pytest.mark.parametrize("kind", ["transformer", "mlp", "classifier"])
def test_every_sublayer_is_built(kind):
    """One that is not makes Keras run the whole model eagerly before the first `predict`."""
    if kind == "classifier":
        model = small(Qwen3NextClassifier, num_labels=2)
    else:
        model = small(dropout=0.1, attention_dropout=0.1, mtp=MTPConfig(mtp_head_type=kind))
    layers, queue = [], [model]
    while queue:
        layer = queue.pop()
        layers.append(layer)
        queue.extend(getattr(layer, "_layers", []))
    assert len(layers) > 20
    assert [layer.name for layer in layers if not layer.built] == []


def test_a_loss_of_logits_is_that_of_the_step(model):
    expected = model.evaluate(IDS, verbose=0, return_dict=True)["loss"]
    loss = model.compute_loss(x=IDS, y_pred=keras.ops.convert_to_tensor(logits_once(model, IDS)))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-5)
