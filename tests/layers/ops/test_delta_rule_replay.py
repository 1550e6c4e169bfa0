"""Any number of tokens of a pass of the delta rule can be kept, without a state for each."""

import numpy as np
import pytest

from qwen3_next.layers.ops import gated_delta_rule, gated_delta_rule_with_replay, replay
from tests.support.running import BACKEND, assert_close, run


def test_any_number_of_tokens_can_be_replayed():
    rng = np.random.default_rng(0)
    batch, length, groups, heads, key_dim, value_dim = 3, 5, 2, 4, 6, 7
    query, key = (rng.normal(size=(batch, length, groups, key_dim)) / 2 for _ in range(2))
    value = rng.normal(size=(batch, length, heads, value_dim))
    decay, beta = -rng.random((batch, length, heads)), rng.random((batch, length, heads))
    state = rng.normal(size=(batch, heads, key_dim, value_dim))
    arrays = [x.astype("float32") for x in (query, key, value, decay, beta, state)]

    def speculate(*xs):
        *xs, state, counts = xs
        output, record = gated_delta_rule_with_replay(*xs, state=state)
        return output, replay(state, record, counts)

    def extend(*xs):
        *xs, state, mask = xs
        return tuple(gated_delta_rule(*xs, state=state, padding_mask=mask))

    for counts in ([0, 1, 2], [3, 4, 5]):
        counts = np.array(counts, "int32")
        output, found = run(speculate, *arrays, counts)
        expected, state = run(extend, *arrays, np.arange(length) < counts[:, None])
        assert_close(found, state, 2e-6)
        real = np.arange(length) < counts[:, None]
        assert_close(output[real], expected[real], 2e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory plan of XLA")
def test_memory_of_a_replay_does_not_grow_by_states():
    import jax

    heads, dim = 4, 128
    state_bytes = heads * dim * dim * 4

    def temporary(length):
        wide = jax.ShapeDtypeStruct((1, length, heads, dim), "float32")
        narrow = jax.ShapeDtypeStruct((1, length, heads), "float32")
        state = jax.ShapeDtypeStruct((1, heads, dim, dim), "float32")
        counts = jax.ShapeDtypeStruct((1,), "int32")

        def speculate(query, key, value, decay, beta, state, counts):
            output, record = gated_delta_rule_with_replay(
                query, key, value, decay, beta, state=state
            )
            return output, replay(state, record, counts)

        program = jax.jit(speculate).lower(wide, wide, wide, narrow, narrow, state, counts)
        return program.compile().memory_analysis().temp_size_in_bytes

    # Six tokens more; a state for each of them would be six times this.
    assert temporary(8) - temporary(2) < state_bytes
