import functools

import numpy as np
import pytest

from qwen3_next.layers.ops import causal_conv1d
from tests.support import oracles
from tests.support.running import (
    BACKEND,
    assert_close,
    assert_same_at_run_time,
    assert_slopes,
    gradients,
    run,
)

TOLERANCE = 2e-6
LENGTH = 30
MASKS = {
    "none": np.ones((2, LENGTH), bool),
    "left": np.arange(LENGTH) >= [[9], [2]],
    "right": np.arange(LENGTH) < [[2], [21]],
    "middle": (np.arange(LENGTH) < 8) | (np.arange(LENGTH) >= [[20], [9]]),
    "ragged": np.random.default_rng(5).random((2, LENGTH)) < 0.5,
    "empty row": np.arange(LENGTH) < [[0], [LENGTH]],
}
SEGMENTS = np.array([[0] * 7 + [1] + [2] * 2 + [3] * 20, [4] * 15 + [1] * 13 + [4, 2]])


OPTIONAL = ("state", "padding_mask", "segment_ids")


@functools.cache
def conv(**options):
    def apply(*arrays):
        given = dict(zip(OPTIONAL, arrays[2:]))
        return tuple(causal_conv1d(*arrays[:2], **given, **options))

    return apply


def inputs(length=LENGTH, batch=2, channels=6, taps=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, channels), (taps, channels), (batch, taps - 1, channels)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def as_oracle(inputs, kernel, state=None, padding_mask=None, segment_ids=None):
    return oracles.causal_conv1d(inputs, kernel, state, segment_ids, padding_mask)


def assert_oracle(arrays, outputs):
    for actual, expected in zip(outputs, as_oracle(*arrays), strict=True):
        assert_close(actual, expected, TOLERANCE)


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = [*inputs(), MASKS["ragged"], SEGMENTS]
    outputs = run(conv(), *arrays, mode=compiled)
    assert_oracle(arrays, outputs)
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=x.shape).astype("float32") for x in outputs]
    assert_slopes(
        as_oracle, arrays, cotangents, gradients(conv(), arrays, cotangents, mode=compiled)
    )


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_any_length_matches_the_oracle(length):
    arrays = inputs(length)
    assert_oracle(arrays, run(conv(), *arrays))


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_any_number_of_taps_matches_the_oracle(taps):
    arrays = [*inputs(taps=taps), MASKS["ragged"], SEGMENTS]
    assert_oracle(arrays, run(conv(), *arrays))


def test_without_a_state_it_starts_from_zeros():
    arrays = inputs()[:2]
    assert_oracle(arrays, run(conv(), *arrays))


def test_activation_is_optional():
    arrays = inputs()
    output, _ = run(conv(activation=None), *arrays)
    assert_close(output, oracles.causal_conv1d(*arrays, activation=False)[0], TOLERANCE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packed", [False, True])
def test_taps_are_real_tokens_wherever_the_padding_is(mask, packed):
    arrays = [*inputs(), MASKS[mask], SEGMENTS if packed else np.zeros_like(SEGMENTS)]
    outputs = run(conv(), *arrays)
    assert_oracle(arrays, outputs)
    assert not outputs[0][~MASKS[mask]].any()


def test_segments_without_padding_match_the_oracle():
    arrays = [*inputs(), None, SEGMENTS]
    assert_oracle(arrays, run(conv(), *arrays))


def test_padding_without_segments_matches_the_oracle():
    arrays = [*inputs(), MASKS["ragged"]]
    assert_oracle(arrays, run(conv(), *arrays))


def test_padded_inputs_do_not_matter():
    arrays = [*inputs(), MASKS["ragged"], SEGMENTS]
    noisy = arrays[0].copy()
    noisy[~MASKS["ragged"]] = np.nan
    outputs, others = run(conv(), *arrays), run(conv(), noisy, *arrays[1:])
    assert all(np.array_equal(a, b) for a, b in zip(outputs, others, strict=True))


def test_packed_rows_equal_separate_rows():
    x, kernel, _ = inputs(batch=1)
    packed = [x, kernel, None, None, np.repeat(np.arange(6), 5)[None]]
    separate = [x.reshape(6, 5, -1), kernel]
    output, state = run(conv(), *packed)
    outputs, states = run(conv(), *separate)
    assert_close(output, outputs.reshape(output.shape), TOLERANCE)
    assert_close(state, states[-1:], TOLERANCE)

    cotangent = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    grads = gradients(conv(), packed, (cotangent, None))
    others = gradients(conv(), separate, (cotangent.reshape(6, 5, -1), None))
    assert_close(grads[0], others[0].reshape(x.shape), TOLERANCE)
    assert_close(grads[1], others[1], TOLERANCE)


@pytest.mark.parametrize("mask", ["none", "ragged", "right"])
def test_two_calls_with_the_state_equal_one(mask):
    x, kernel, state = inputs()
    mask = MASKS[mask]
    output, final = run(conv(), x, kernel, state, mask)
    outputs = []
    for part in (slice(0, 15), slice(15, 30)):
        part_output, state = run(conv(), x[:, part], kernel, state, mask[:, part])
        outputs.append(part_output)
    assert_close(np.concatenate(outputs, axis=1), output, TOLERANCE)
    assert_close(state, final, TOLERANCE)


def test_a_later_token_does_not_reach_an_earlier_one():
    x, kernel, state = inputs()
    changed = x.copy()
    changed[:, 20] += 1.0
    output, other = run(conv(), x, kernel, state)[0], run(conv(), changed, kernel, state)[0]
    assert np.array_equal(output[:, :20], other[:, :20])
    assert not np.array_equal(output[:, 20], other[:, 20])


def test_a_one_percent_error_in_the_kernel_is_seen():
    x, kernel, state = inputs()
    with pytest.raises(AssertionError, match="off by"):
        assert_oracle([x, kernel, state], run(conv(), x, kernel * 1.01, state))


@pytest.mark.parametrize(
    "name, place, shape",
    [
        ("kernel", 0, (2, 30, 5)),
        ("inputs", 0, (30, 6)),
        ("kernel", 1, (4, 1, 6)),
        ("state", 2, (2, 4, 6)),
    ],
)
def test_an_error_names_the_argument(name, place, shape):
    arrays = inputs()
    arrays[place] = np.zeros(shape, "float32")
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        conv()(*arrays)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX tells what the backward pass keeps")
def test_only_the_inputs_are_kept_for_the_backward_pass():
    import jax

    values, kernel, _ = inputs(length=500)
    _, pullback = jax.vjp(lambda *arrays: conv()(*arrays)[0], values, kernel)
    kept = sum(x.nbytes for x in jax.tree.leaves(pullback))
    assert kept < 1.1 * values.nbytes


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere shapes are known")
def test_rows_and_tokens_that_only_the_run_tells_have_the_same_gradients():
    def output(*arrays):
        return conv()(*arrays)[0]

    assert_same_at_run_time(output, inputs()[:2], [2, 0], TOLERANCE)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({name: [[[1]]]}, f"`{name}` must be floats") for name in ("inputs", "kernel", "state")),
        ({"segment_ids": np.ones((2, LENGTH))}, "`segment_ids` must be integers"),
        ({"padding_mask": np.full((2, LENGTH), np.nan)}, "`padding_mask` must not hold NaN"),
    ],
)
def test_what_a_cast_would_change_is_refused(changes, message):
    arguments = dict(zip(("inputs", "kernel", "state"), inputs())) | changes
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        causal_conv1d(**arguments)
