"""The decoder layer: what it returns, dropout, checkpointing, and where files keep its weights."""

import h5py
import keras
import numpy as np
import pytest

from qwen3_next import layers
from tests.support.layers import load_published, new_layer, program, subject, tokens
from tests.support.running import (
    assert_close,
    gradients,
    run,
    weight_arrays,
    weight_gradients,
    with_weights,
)


def test_what_a_layer_has_not_is_empty():
    mixer = layers.GatedDeltaNet(1, 2, 4, 4)
    layer = layers.DecoderLayer(mixer, layers.SwiGLU(6))
    layer.build((None, None, 8))
    output = run(lambda x: layer(x, full_output=True), np.ones((1, 3, 8), "float32"))
    assert isinstance(output, layers.DecoderLayerOutput)
    assert output.hidden.shape == (1, 3, 8)
    assert output.cache == () and output.routing == ()


@pytest.mark.portable
def test_residual_dropout_changes_training_only():
    name = "decoder_layer_full"
    dropped = load_published(new_layer(name, dropout=0.5), name)
    expected = program(name, "plain")(tokens())

    def both(x):
        return dropped(x, training=False), dropped(x, training=True)

    calm, trained = run(with_weights(dropped, both), *weight_arrays(dropped), tokens())
    assert_close(calm, expected, 1e-5)
    assert np.abs(trained - expected).max() > 1e-2


def test_gradient_checkpointing_changes_no_gradient():
    name, x = "decoder_layer_linear", tokens()
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    it = subject(name)
    expected = gradients(it.plain_of_weights, [*it.weights, x], cotangent)[:-1]
    layer = load_published(new_layer(name, gradient_checkpointing=True), name)
    grads = weight_gradients(layer, lambda x: layer(x, training=True), x, cotangent)
    for grad, want in zip(grads, expected, strict=True):
        size = max(1.0, np.abs(want).max())
        assert_close(grad / size, want / size, 1e-6)


@keras.saving.register_keras_serializable(package="qwen3_next_tests")
class Holder(keras.Model):
    """A model of one layer: Keras writes files of models only."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.built = True


@pytest.mark.parametrize(
    "name, attribute, path",
    [
        ("decoder_layer_linear", "linear_attn", "linear_attn"),
        ("decoder_layer_full", "mixer", "self_attn"),
    ],
)
def test_files_and_paths_keep_the_weights_of_a_mixer_where_they_are(
    name, attribute, path, tmp_path
):
    layer = new_layer(name)
    paths = [v.path.split("/", 1)[1] for v in layer.trainable_variables]
    mixer = [v.path for v in layer.mixer.trainable_variables]
    assert [v.path for v in layer.trainable_variables][: len(mixer)] == mixer
    assert all(p.startswith(f"{path}/") for p in paths[: len(mixer)])
    assert not any(p.startswith(f"{path}/") for p in paths[len(mixer) :])
    Holder(layer).save_weights(tmp_path / "layer.weights.h5")
    with h5py.File(tmp_path / "layer.weights.h5") as file:
        places = []
        file["layer"].visititems(
            lambda place, item: places.append(place) if isinstance(item, h5py.Dataset) else None
        )
    under = [place.split("/")[0] for place in places]
    assert under.count(attribute) == len(layer.mixer.variables)
    assert len({"linear_attn", "mixer", "self_attn"} & set(under)) == 1
