"""What holds for every mixer, alone and in a decoder layer: padding, packing, caches, refusals."""

import inspect

import numpy as np
import pytest
from keras import ops

from qwen3_next import layers
from tests.support.layers import (
    MIXERS,
    ROWS,
    SPACE,
    SPREAD,
    TOKENS,
    WIDTH,
    padded,
    program,
    subject,
    tokens,
)
from tests.support.running import assert_close, gradients, with_weights

# A decoder layer gives its mixer all that it is called with.
WHOLE_LAYERS = ["decoder_layer_linear", "decoder_layer_full"]


def test_mixers_share_a_signature():
    arguments = ["self", "x", *layers.MixerContext._fields]
    defaults = [*layers.MixerContext._field_defaults.values()]
    for mixer in (layers.GatedAttention, layers.GatedDeltaNet):
        parameters = inspect.signature(mixer.call).parameters
        assert list(parameters) == arguments
        assert [p.default for p in parameters.values()][2:] == defaults


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_padding_anywhere_does_not_change_real_tokens(name):
    x = tokens()
    noisy, mask = padded(x, SPREAD)
    output = program(name, "masked")(noisy, mask, np.zeros(mask.shape, "int32"))
    assert np.isfinite(output).all()
    expected = program(name, "plain")(x)
    assert_close(output[mask].reshape(expected.shape), expected, 1e-5)


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_packed_sequences_equal_separate_ones(name):
    x = tokens()
    rng = np.random.default_rng(3)
    orders = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    spread = [np.sort(rng.choice(SPACE, 3 * TOKENS, replace=False)) for _ in range(ROWS)]
    rows = np.concatenate([x[order].reshape(1, -1, WIDTH) for order in orders])
    noisy, mask = padded(rows, spread)
    ids = rng.integers(0, 3, mask.shape).astype("int32")
    ids[mask] = np.repeat(np.ravel(orders), TOKENS)
    output = program(name, "masked")(noisy, mask, ids)
    expected = program(name, "plain")(x)[np.ravel(orders)]
    assert_close(output[mask].reshape(expected.shape), expected, 1e-5)


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_a_cache_in_one_chunk_equals_no_cache(name):
    x = tokens()
    mask = np.ones(x.shape[:2], bool)
    start = np.zeros(ROWS, "int32")
    cache = subject(name).empty_cache(TOKENS + 2)
    output, _ = program(name, "cached")(x, mask, cache, start)
    assert_close(output, program(name, "plain")(x), 1e-5)


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_a_cache_in_ragged_chunks_equals_no_cache(name):
    x = tokens()
    counts = [[5, 0, 6, 1], [2, 8, 1, 1], [4, 4, 3, 0]]
    expected = program(name, "plain")(x)
    rng = np.random.default_rng(6)
    cache = subject(name).empty_cache(TOKENS + 2)
    lengths = np.zeros(ROWS, "int32")
    for number in range(4):
        space = 1 if number == 3 else TOKENS
        chunk = rng.normal(size=(ROWS, space, WIDTH)).astype("float32")
        mask = np.zeros((ROWS, space), bool)
        for row in range(ROWS):
            count = counts[row][number]
            places = np.sort(rng.choice(space, count, replace=False))
            mask[row, places] = True
            chunk[row, places] = x[row, lengths[row] : lengths[row] + count]
        output, cache = program(name, "cached")(chunk, mask, cache, lengths)
        for row in range(ROWS):
            seen = slice(lengths[row], lengths[row] + counts[row][number])
            assert_close(output[row][mask[row]], expected[row, seen], 1e-5)
        lengths = lengths + mask.sum(1).astype("int32")
    assert lengths.tolist() == [12, 12, 11]


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_a_committed_pass_goes_on_from_the_tokens_that_stay(name):
    x, read, ahead = tokens(), 4, 6
    counts = np.array([0, 2, ahead], "int32")
    expected = program(name, "plain")(x)
    cache, lengths = subject(name).empty_cache(TOKENS + 2), np.zeros(ROWS, "int32")
    mask = np.tile(np.arange(TOKENS) < read, (ROWS, 1))
    _, cache = program(name, "cached")(x, mask, cache, lengths)
    lengths = lengths + read
    output, cache = program(name, "replayed")(x[:, read : read + ahead], cache, lengths, counts)
    assert_close(output, expected[:, read : read + ahead], 1e-5)
    lengths = lengths + counts
    rest = np.stack([np.roll(row, -start, axis=0) for row, start in zip(x, lengths, strict=True)])
    mask = np.arange(TOKENS) < (TOKENS - lengths)[:, None]
    output, _ = program(name, "cached")(rest, mask, cache, lengths)
    for row, start in enumerate(lengths):
        assert_close(output[row, : TOKENS - start], expected[row, start:], 1e-5)


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_rows_and_later_tokens_do_not_reach_a_token(name):
    x = tokens()
    output = program(name, "plain")(x)
    changed = x.copy()
    changed[0] += 1.0
    changed[1:, -1] += 1.0
    other = program(name, "plain")(changed)
    assert_close(other[1:, :-1], output[1:, :-1], 1e-6)
    assert np.abs(other[1:, -1] - output[1:, -1]).max() > 1e-2


@pytest.mark.parametrize("name", ["decoder_layer_linear", "attention"])
def test_padding_does_not_change_the_gradients(name):
    it, x = subject(name), tokens()
    noisy, mask = padded(x, SPREAD)
    cotangent = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    wide_cotangent = np.zeros(noisy.shape, "float32")
    wide_cotangent[mask] = cotangent.reshape(-1, WIDTH)
    expected = gradients(it.plain_of_weights, [*it.weights, x], cotangent)
    arrays = [*it.weights, noisy, mask, None]
    grads = gradients(with_weights(it.layer, it.masked), arrays, wide_cotangent)
    for grad, want in zip(grads[: len(it.weights)], expected, strict=False):
        size = max(1.0, np.abs(want).max())
        assert_close(grad / size, want / size, 1e-5)
    d_noisy = grads[len(it.weights)]
    assert_close(d_noisy[mask].reshape(x.shape), expected[-1], 1e-5)
    assert not d_noisy[~mask].any()


REFUSED = {
    "packed sequences with a cache": (
        ["segment_ids", "cache", "lengths"],
        r"`segment_ids` must be None .*Received: segment_ids=",
    ),
    "packed sequences in a replayable pass": (
        ["segment_ids", "replayable"],
        r"`segment_ids` must be None .*Received: segment_ids=",
    ),
    "a replayable pass without a cache": (
        ["replayable"],
        r"`replayable` pass continues a `cache`.* Received: replayable=True, cache=None",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_refuses(name, case):
    given, message = REFUSED[case]
    layer = subject(name).layer
    values = {
        "segment_ids": ops.zeros((ROWS, TOKENS), "int32"),
        "cache": layer.init_cache(ROWS, TOKENS),
        "lengths": ops.zeros((ROWS,), "int32"),
        "replayable": True,
    }
    with pytest.raises(ValueError, match=message):
        layer(ops.convert_to_tensor(tokens()), **{key: values[key] for key in given})


@pytest.mark.parametrize("name", ["attention", "decoder_layer_full"])
def test_the_cache_of_an_attention_needs_lengths(name):
    layer = subject(name).layer
    with pytest.raises(ValueError, match=r"`lengths`.* Received: lengths=None"):
        layer(ops.convert_to_tensor(tokens()), cache=layer.init_cache(ROWS, TOKENS))
