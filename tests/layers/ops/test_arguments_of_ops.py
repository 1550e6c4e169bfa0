"""What is no argument of an op is refused by name, before anything is computed."""

import inspect

import numpy as np
import pytest

from qwen3_next.layers import ops
from qwen3_next.layers.ops.gated_delta_rule.replay import empty_replay
from tests.support.running import BACKEND

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="arguments are read on the host")


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def zeros(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


HEAD = {"hidden": normal(3, 4), "kernel": normal(4, 5)}
STATE = normal(1, 2, 8, 8)
RULE = {
    "query": normal(1, 4, 1, 8),
    "key": normal(1, 4, 1, 8),
    "value": normal(1, 4, 2, 8),
    "log_decay": -np.abs(normal(1, 4, 2)),
    "beta": np.abs(normal(1, 4, 2)),
    "state": STATE,
    "padding_mask": zeros(1, 4, dtype="bool"),
    "scale": 1.0,
}
DISTILLED = {"temperature": 1.0, "mask": zeros(3, dtype="bool"), "chunk_rows": 2}
CALLS = {
    ops.attention: {
        "query": normal(1, 4, 2, 8),
        "key": normal(1, 4, 1, 8),
        "value": normal(1, 4, 1, 8),
        "limits": zeros(1, 4),
        "key_mask": zeros(1, 4, dtype="bool"),
        "query_segments": zeros(1, 4),
        "key_segments": zeros(1, 4),
        "scale": 1.0,
        "dropout": 0.5,
        "dropout_seed": zeros(2, dtype="uint32"),
        "implementation": "chunked",
    },
    ops.causal_conv1d: {
        "inputs": normal(1, 4, 8),
        "kernel": normal(3, 8),
        "state": normal(1, 2, 8),
        "padding_mask": zeros(1, 4, dtype="bool"),
        "segment_ids": zeros(1, 4),
        "activation": "silu",
    },
    ops.gated_delta_rule: {
        **RULE,
        "segment_ids": zeros(1, 4),
        "chunk_size": 2,
        "implementation": "chunked",
    },
    ops.gated_delta_rule_with_replay: RULE,
    ops.replay: {"state": STATE, "record": empty_replay(STATE, 1, 4), "counts": zeros(1)},
    ops.expert_mlp: {
        "x": normal(3, 4),
        "gate_up": normal(2, 4, 6),
        "down": normal(2, 3, 4),
        "experts": zeros(3, 1),
        "weights": normal(3, 1),
        "activation": "silu",
        "implementation": "tiled",
    },
    ops.grouped_matmul: {
        "rows": normal(3, 4),
        "weights": normal(2, 4, 5),
        "group_sizes": zeros(2),
        "implementation": "tiled",
    },
    ops.cross_entropy: {"logits": normal(3, 5), "labels": zeros(3)},
    ops.linear_cross_entropy: {
        **HEAD,
        "labels": zeros(3),
        "chunk_rows": 2,
        "keep_logits": True,
        "return_correct": True,
    },
    ops.linear_kl_divergence: {
        **HEAD,
        "teacher_hidden": normal(3, 6),
        "teacher_kernel": normal(6, 5),
        **DISTILLED,
    },
    ops.linear_top_kl_divergence: {
        **HEAD,
        "teacher_ids": zeros(3, 2),
        "teacher_log_probs": normal(3, 2),
        **DISTILLED,
    },
    ops.linear_top_log_probs: {**HEAD, "count": 2, "temperature": 1.0, "chunk_rows": 2},
}
NEITHER = ["text", object(), {"a": 1}, [[1], [1, 2]], ["a"], float("nan"), 10**400, 1j, b"x", {1}]


def no_arrays(array):
    """What may not stand for an array: no numbers, others than its own, or of other shapes."""
    floats, mask = array.dtype.kind == "f", array.dtype.kind == "b"
    yield from (array.astype(dtype) for dtype in ("O", "U", "complex64", "M8[s]"))
    if not mask:
        yield array.astype("int32" if floats else "float32")
    yield from (array[None], array[..., :0])


def wrong(value):
    yield from NEITHER
    if isinstance(value, np.ndarray):
        yield from no_arrays(value)


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_what_is_no_argument_is_refused_by_name(op):
    arguments, taken = CALLS[op], []
    assert set(arguments) == set(inspect.signature(op).parameters)
    for name, value in arguments.items():
        required = inspect.signature(op).parameters[name].default is inspect.Parameter.empty
        for mutant in [*wrong(value), *([None] if required else [])]:
            shape = getattr(mutant, "shape", ())
            if (op, name, shape) == (ops.grouped_matmul, "weights", (2, 4, 0)):
                continue  # a matrix may well have no columns
            try:
                op(**{**arguments, name: mutant})
            except (TypeError, ValueError) as error:
                assert "Received: " in str(error), (name, mutant)
                assert any(f"`{n}`" in str(error) for n in arguments) or f"{name}=" in str(error)
            else:
                taken.append((name, mutant))
    assert not taken
