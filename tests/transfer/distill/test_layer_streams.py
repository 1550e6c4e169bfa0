"""The streams through the layers are those of the model itself."""

import functools
import itertools

import numpy as np
import pytest
from keras import ops

from qwen3_next import ETDConfig, pad
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.transfer.distill.layer_streams import layer_outputs, layer_streams
from tests.support.running import CHEAPEST, assert_close, to_numpy, to_tensors
from tests.support.small_models import SMALL, TWO_LAYERS, random_ids, small

IDS = random_ids(2, 9)
BATCH = pad([IDS[0], IDS[1, :5]], side="left")


@functools.cache
def model():
    return small(**TWO_LAYERS)


@functools.cache
def found(function):
    """What a function finds in the model, for the padded batch."""
    return computed(function, BATCH)


def computed(function, inputs):
    call = functools.partial(function, model())
    if CHEAPEST != "eager":
        call = compile_with_weights(model(), call)
    return to_numpy(call(to_tensors(inputs)))


def whole(model, inputs):
    return model.backbone(inputs, full_output=True)


def test_every_layer_reads_what_the_one_before_returns():
    streams = found(layer_streams)
    assert len(streams) == 2
    for stream, following in itertools.pairwise(streams):
        np.testing.assert_array_equal(stream.output, following.hidden)
    assert_close(streams[-1].output, found(whole).before_norm, 1e-6)


def test_the_layers_outputs_are_those_of_the_backbone():
    outputs = found(layer_outputs)
    for part in ("hidden", "before_norm", "aux_loss", "expert_load"):
        assert_close(getattr(outputs.backbone, part), getattr(found(whole), part), 1e-6)
    for layer, stream in zip(outputs.layers, found(layer_streams), strict=True):
        assert_close(layer, stream.output, 1e-6)


def test_what_a_mixer_adds_is_what_its_layer_adds_without_the_rest():
    streams, layer = found(layer_streams), model().backbone.decoder_layers[1]
    mixed = layer.mixer(
        layer.input_layernorm(ops.convert_to_tensor(streams[1].hidden)),
        padding_mask=ops.convert_to_tensor(BATCH["padding_mask"]),
    )
    assert_close(streams[1].mixed, to_numpy(mixed), 1e-6)
    assert np.abs(streams[1].mixed).max() > 1e-3


def test_padding_does_not_change_the_streams_of_real_tokens():
    alone = computed(layer_streams, {"token_ids": IDS[1:, :5]})
    for stream, expected in zip(found(layer_streams), alone, strict=True):
        for part, value in zip(stream, expected):
            assert_close(part[1, -5:], value[0], 2e-6)


@pytest.mark.parametrize(
    ("make", "inputs", "name"),
    [
        (lambda: "model", IDS, "model"),
        (lambda: small(etd=ETDConfig(1, 1, 1)), IDS, "model"),
        (model, np.full((1, 3), SMALL["vocab_size"]), "vocab_size"),
        (model, np.ones((1, SMALL["max_position_embeddings"] + 1), int), "inputs"),
        (model, {"token_ids": IDS, "route": np.ones((2, 1), int)}, "route"),
    ],
)
def test_what_has_no_streams_is_refused(make, inputs, name):
    for function in (layer_streams, layer_outputs):
        with pytest.raises(ValueError, match=f"{name}.*Received"):
            function(make(), inputs)
