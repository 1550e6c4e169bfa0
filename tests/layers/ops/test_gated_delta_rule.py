import functools
from pathlib import Path

import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from qwen3_next.layers.ops import gated_delta_rule
from tests.support import oracles
from tests.support.running import (
    BACKEND,
    assert_close,
    assert_same_at_run_time,
    assert_slopes,
    gradients,
    run,
    to_numpy,
)

FIXTURES = np.load(Path(__file__).parents[2] / "fixtures" / "layers.npz")
TOLERANCE = 2e-6
UNMASKED = np.ones((2, 130), bool), np.zeros((2, 130), "int64")
MASKS = {
    "left": np.arange(130) >= [[40], [3]],
    "right": np.arange(130) < [[64], [101]],
    "middle": (np.arange(130) < 50) | (np.arange(130) >= [[90], [51]]),
    "ragged": np.random.default_rng(5).random((2, 130)) < 0.6,
    "empty row": np.arange(130) < [[0], [130]],
}


OPTIONAL = ("state", "padding_mask", "segment_ids")
# How the state gets over the chunks, where all else is done for all of them at once.
LOOPS = ("chunk_parallel", "pallas") if BACKEND == "jax" else ("chunk_parallel",)


@functools.cache
def rule(**options):
    def apply(*arrays):
        given = dict(zip(OPTIONAL, arrays[5:]))
        return tuple(gated_delta_rule(*arrays[:5], **given, **options))

    return apply


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(length=130, batch=2, groups=2, heads=4, key_dim=16, value_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    query, key = (unit(rng.normal(size=(batch, length, groups, key_dim))) for _ in range(2))
    value = rng.normal(size=(batch, length, heads, value_dim))
    log_decay = -rng.random((batch, length, heads))
    beta = rng.random((batch, length, heads))
    state = rng.normal(size=(batch, heads, key_dim, value_dim))
    return [x.astype("float32") for x in (query, key, value, log_decay, beta, state)]


def segments(seed=0, batch=2, length=130):
    return np.sort(np.random.default_rng(seed).integers(0, 5, (batch, length)), axis=1)


def cotangents_of(arrays, seed=9):
    rng = np.random.default_rng(seed)
    shapes = arrays[2].shape, arrays[5].shape
    return tuple(rng.normal(size=shape).astype("float32") for shape in shapes)


def as_oracle(query, key, value, log_decay, beta, state=None, padding_mask=None, segment_ids=None):
    return oracles.gated_delta_rule(
        query, key, value, log_decay, beta, state, segment_ids, padding_mask
    )


def assert_oracle(arrays, outputs, tolerance=TOLERANCE):
    for actual, expected in zip(outputs, as_oracle(*arrays), strict=True):
        assert_close(actual, expected, tolerance)


@pytest.mark.portable
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 130])
def test_any_length_matches_the_oracle(length):
    arrays = inputs(length)
    assert_oracle(arrays, run(rule(), *arrays))


@pytest.mark.parametrize("groups", [4, 1])
def test_value_heads_share_key_heads_and_start_from_zero(groups):
    arrays = inputs(65, groups=groups)[:5]
    assert_oracle(arrays, run(rule(), *arrays))


@pytest.mark.portable
def test_every_mode_matches_the_oracle(compiled):
    arrays = [*inputs(), MASKS["ragged"], segments()]
    assert_oracle(arrays, run(rule(), *arrays, mode=compiled))
    cotangents = cotangents_of(arrays)
    assert_slopes(
        as_oracle, arrays, cotangents, gradients(rule(), arrays, cotangents, mode=compiled)
    )


def test_published_implementation_agrees():
    names = ("query", "key", "value", "g", "beta", "initial_state")
    arrays = [FIXTURES[f"delta_rule/in/{name}"].astype("float32") for name in names]
    output, state = run(rule(), *arrays)
    for form in ("chunk", "recurrent"):
        assert_close(output, FIXTURES[f"delta_rule/out/{form}"], 1e-5)
        assert_close(state, FIXTURES[f"delta_rule/out/{form}_state"], 1e-5)


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_every_chunk_size_matches_the_oracle(chunk_size):
    arrays = [*inputs(), MASKS["ragged"], segments()]
    assert_oracle(arrays, run(rule(chunk_size=chunk_size), *arrays))


def test_scale_multiplies_the_query():
    arrays = inputs(3)
    output, state = run(rule(scale=0.5), *arrays)
    expected, expected_state = oracles.gated_delta_rule(*arrays, scale=0.5)
    assert_close(output, expected, TOLERANCE)
    assert_close(state, expected_state, TOLERANCE)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packed", [False, True])
def test_padding_anywhere_leaves_the_state_alone(mask, packed):
    arrays = [*inputs(), MASKS[mask], segments() if packed else UNMASKED[1]]
    output, state = run(rule(), *arrays)
    assert_oracle(arrays, (output, state))
    assert not output[~MASKS[mask]].any()


def test_padding_without_segments_matches_the_oracle():
    arrays = [*inputs(), MASKS["ragged"]]
    assert_oracle(arrays, run(rule(), *arrays))


def test_padded_values_do_not_matter():
    arrays = [*inputs(), MASKS["ragged"], segments()]
    noisy = [x.copy() for x in arrays[:5]]
    for x in noisy:
        x[~MASKS["ragged"]] = 1e3
    for clean, other in zip(run(rule(), *arrays), run(rule(), *noisy, *arrays[5:]), strict=True):
        assert_close(other, clean, TOLERANCE)


def test_segment_ids_may_come_back_and_fall():
    ids = np.repeat([[3, 1, 3, 0, 7], [2, 2, -1, 2, 2]], 26, axis=1)
    arrays = [*inputs(), UNMASKED[0], ids]
    assert_oracle(arrays, run(rule(), *arrays))


def test_packed_rows_equal_separate_rows():
    arrays = inputs(batch=1)[:5]
    packed = [*arrays, None, None, np.repeat(np.arange(5), 26)[None]]
    separate = [x.reshape(5, 26, *x.shape[2:]) for x in arrays]
    output, state = run(rule(chunk_size=16), *packed)
    outputs, states = run(rule(chunk_size=16), *separate)
    assert_close(output, outputs.reshape(output.shape), TOLERANCE)
    assert_close(state, states[-1:], TOLERANCE)

    cotangent = cotangents_of(inputs(batch=1))[0]
    grads = gradients(rule(chunk_size=16), packed, (cotangent, None))
    others = gradients(rule(chunk_size=16), separate, (cotangent.reshape(outputs.shape), None))
    for grad, other in zip(grads[:5], others, strict=True):
        assert_close(grad, other.reshape(grad.shape), TOLERANCE)


def test_two_calls_with_the_state_equal_one():
    arrays = inputs()
    mask = MASKS["ragged"]
    output, state = run(rule(chunk_size=16), *arrays, mask)
    carried, outputs = arrays[5], []
    for part in (slice(0, 65), slice(65, 130)):
        part_output, carried = run(
            rule(chunk_size=16), *(x[:, part] for x in arrays[:5]), carried, mask[:, part]
        )
        outputs.append(part_output)
    assert_close(np.concatenate(outputs, axis=1), output, TOLERANCE)
    assert_close(carried, state, TOLERANCE)


@pytest.mark.portable
def test_recurrent_and_chunked_implementations_agree():
    arrays = [*inputs(4), np.arange(4) < [[4], [3]]]
    cotangents = cotangents_of(arrays)
    for implementation in ("recurrent", "chunked"):
        function = rule(implementation=implementation)
        assert_oracle(arrays, run(function, *arrays))
        assert_slopes(as_oracle, arrays, cotangents, gradients(function, arrays, cotangents))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("chunk_size, sizes", [(32, {}), (8, {"key_dim": 20, "value_dim": 72})])
def test_parallel_chunks_agree_with_chunks_in_turn(loop, chunk_size, sizes):
    arrays = [*inputs(**sizes), MASKS["ragged"], segments()]
    together = rule(implementation=loop, chunk_size=chunk_size)
    assert_oracle(arrays, run(together, *arrays))
    cotangents = cotangents_of(arrays)
    found = gradients(together, arrays, cotangents)
    for one, other in zip(found, gradients(rule(), arrays, cotangents), strict=True):
        if one is not None:
            assert_close(one, other, 1e-5)


def test_correlated_keys_with_full_writes_and_hardly_any_decay():
    query, key, value, log_decay, beta, state = inputs()
    shared = np.random.default_rng(1).normal(size=(1, 1, 2, 16))
    key = unit(shared + 0.05 * key).astype("float32")
    arrays = [query, key, value, 1e-3 * log_decay, np.ones_like(beta), state, *UNMASKED]
    assert_oracle(arrays, run(rule(), *arrays), 1e-5)


@pytest.mark.parametrize("where", ["all tokens", "some tokens"])
def test_strong_decay_hides_no_weak_one(where):
    arrays = [*inputs(), *UNMASKED]
    strong = np.arange(4) % 2 == 0
    if where == "some tokens":
        strong = np.random.default_rng(2).random(arrays[3].shape) < 0.3
    arrays[3] = np.broadcast_to(np.where(strong, -50.0, -1e-3), arrays[3].shape).astype("float32")
    assert_oracle(arrays, run(rule(), *arrays))
    cotangents = cotangents_of(arrays)
    assert_slopes(as_oracle, arrays, cotangents, gradients(rule(), arrays, cotangents))


@pytest.mark.parametrize("log_decay", [-1000.0, -float("inf")])
def test_annihilating_decay_gives_finite_gradients(log_decay):
    arrays = [*inputs(), *UNMASKED]
    strong = np.random.default_rng(2).random(arrays[3].shape) < 0.3
    arrays[3] = np.where(strong, log_decay, arrays[3]).astype("float32")
    assert_oracle(arrays, run(rule(), *arrays))
    cotangents = cotangents_of(arrays)
    assert_slopes(as_oracle, arrays, cotangents, gradients(rule(), arrays, cotangents))


def test_errors_do_not_grow_over_a_long_sequence():
    arrays = inputs(8192, batch=1, groups=1, heads=1, value_dim=16)
    arrays[3] *= 0.01
    assert_oracle(arrays, run(rule(), *arrays), 5e-6)


def test_a_later_token_does_not_reach_an_earlier_one():
    arrays = [*inputs(), *UNMASKED]
    changed = [x.copy() for x in arrays]
    for x in changed[:5]:
        x[:, 100] *= 0.5
    output, other = run(rule(), *arrays)[0], run(rule(), *changed)[0]
    assert np.array_equal(output[:, :100], other[:, :100])
    assert not np.allclose(output[:, 100], other[:, 100])


def test_half_precision_inputs_keep_a_float32_state():
    arrays = inputs(65)
    rounded = [*to_numpy([ops.cast(x, "bfloat16") for x in arrays[:5]]), arrays[5]]
    dtypes = []

    def in_half(*arrays):
        *arrays, state = arrays
        outputs = rule()(*(ops.cast(x, "bfloat16") for x in arrays), state)
        dtypes.extend(standardize_dtype(x.dtype) for x in outputs)
        return outputs

    output, state = run(in_half, *rounded)
    assert dtypes[:2] == ["bfloat16", "float32"]
    expected, expected_state = as_oracle(*rounded)
    assert_close(output, expected, 4e-3)
    assert_close(state, expected_state, TOLERANCE)


def test_a_one_percent_error_in_the_keys_is_seen():
    arrays = inputs(65)
    outputs = run(rule(), arrays[0], arrays[1] * 1.01, *arrays[2:])
    with pytest.raises(AssertionError, match="off by"):
        assert_oracle(arrays, outputs)


def test_a_one_percent_error_in_a_gradient_is_seen():
    arrays = [*inputs(), *UNMASKED]
    cotangents = cotangents_of(arrays)
    grads = gradients(rule(), arrays, cotangents)
    assert_slopes(as_oracle, arrays, cotangents, grads)
    for place in range(6):
        wrong = [grad * 1.01 if i == place else None for i, grad in enumerate(grads)]
        with pytest.raises(AssertionError, match=f"argument {place}"):
            assert_slopes(as_oracle, arrays, cotangents, wrong)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("query", {"query": (2, 8, 16)}),
        ("query", {"key": (2, 8, 2, 15)}),
        ("key", {"value": (2, 7, 4, 8)}),
        ("beta", {"beta": (3, 8, 4)}),
        ("padding_mask", {"padding_mask": (2, 9)}),
        ("segment_ids", {"segment_ids": (8,)}),
        ("value", {"value": (2, 8, 3, 8)}),
        ("log_decay", {"log_decay": (2, 8, 2)}),
        ("beta", {"beta": (2, 8)}),
        ("state", {"state": (2, 4, 8, 16)}),
        ("chunk_size", {"chunk_size": 48}),
        ("implementation", {"implementation": "fast"}),
        ("implementation", {"implementation": "recurrent", "segment_ids": (2, 8)}),
    ],
)
def test_an_error_names_the_argument(name, changes):
    names = ("query", "key", "value", "log_decay", "beta", "state")
    arguments = dict(zip(names, inputs(8), strict=True))
    for key, value in changes.items():
        dtype = "int32" if key == "segment_ids" else "float32"
        arguments[key] = np.zeros(value, dtype) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=f"{name}.*Received"):
        gated_delta_rule(**arguments)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX rounds operands on accelerators by default")
@pytest.mark.parametrize("length", [2, 40])
def test_every_product_is_in_full_precision(length):
    import jax

    def loss(*arrays):
        return gated_delta_rule(*arrays).output.sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs(length)[:5]).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere shapes are known")
def test_rows_and_tokens_that_only_the_run_tells_have_the_same_gradients():
    def output(*arrays):
        return rule()(*arrays)[0]

    assert_same_at_run_time(output, inputs()[:5], [2] * 5, TOLERANCE)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(
            ({name: np.ones(2, "int32")}, f"`{name}` must be floats")
            for name in ("query", "key", "value", "log_decay", "beta", "state")
        ),
        ({"query": [[[[1, 2]]]]}, "`query` must be floats"),
        *(({"scale": scale}, "`scale` must be") for scale in (np.nan, np.inf, "a")),
        ({"segment_ids": np.ones((2, 8))}, "`segment_ids` must be integers"),
        ({"segment_ids": np.ones((2, 8), bool)}, "`segment_ids` must be integers"),
        ({"segment_ids": np.full((2, 8), 2**32 + 1)}, "`segment_ids` must fit in int32"),
        ({"padding_mask": np.full((2, 8), np.nan)}, "`padding_mask` must not hold NaN"),
    ],
)
def test_what_a_cast_would_change_is_refused(changes, message):
    names = ("query", "key", "value", "log_decay", "beta", "state")
    arguments = dict(zip(names, inputs(8), strict=True)) | changes
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        gated_delta_rule(**arguments)


def test_lists_are_arrays():
    arrays = inputs(3)
    listed = gated_delta_rule(*(x.tolist() for x in arrays[:5]), state=arrays[5].tolist())
    assert_close(to_numpy(listed.output), run(rule(), *arrays)[0], TOLERANCE)
    with pytest.raises(TypeError, match=r"`key` must be an array.*Received"):
        gated_delta_rule(arrays[0], "a", *arrays[2:5])
