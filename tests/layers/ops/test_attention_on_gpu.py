"""What a machine without a GPU can tell of the kernels; their numbers are in the op's own tests."""

import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops import attention
from qwen3_next.layers.ops.attention import api, chunked_attention
from tests.support.pretended_gpu import lowered_for_gpu
from tests.support.running import BACKEND, assert_close, run

HEADS, GROUPS, DIM = 4, 2, 8
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="the kernels are JAX's")


def inputs(length, keys=None):
    rng = np.random.default_rng(0)
    shapes = (length, HEADS), (keys or length, GROUPS), (keys or length, GROUPS)
    return [rng.normal(size=(2, *shape, DIM)).astype("float32") for shape in shapes]


@ON_JAX
@pytest.mark.parametrize("dtype, dim", [("bfloat16", 256), ("float32", 256), ("bfloat16", 24)])
def test_attention_and_its_gradients_are_three_kernels_on_a_gpu(dtype, dim):
    import jax

    def loss(*arrays):
        *arrays, limits = arrays
        output = attention(*arrays, limits=limits, implementation="pallas")
        return ops.sum(ops.cast(output, "float32"))

    shapes = [(1, 8192, 16, dim), (1, 9001, 2, dim), (1, 9001, 2, dim)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((1, 8192), "int32"))
    jaxpr, program = lowered_for_gpu(jax.grad(loss, argnums=(0, 1, 2)), *arrays)
    assert program.count("gpu.triton") == 3
    assert "stablehlo.while" not in program
    assert ("TF32_TF32_F32_X3" in jaxpr) == (dtype == "float32")


@ON_JAX
def test_the_kernels_are_what_a_gpu_runs_where_they_can(monkeypatch):
    import jax

    def found(length=65, **options):
        arrays = inputs(length)
        if options.pop("half", False):
            arrays = [ops.cast(x, "bfloat16") for x in arrays]
        # A function of its own, whose trace is not known from another platform.
        return str(jax.make_jaxpr(lambda *arrays: attention(*arrays, **options))(*arrays))

    limits = {"limits": np.arange(65)[None]}
    assert "pallas_call" not in found(**limits)
    monkeypatch.setattr(api, "platform", lambda: "gpu")
    assert "pallas_call" in found(**limits)
    assert "pallas_call" in found()  # in float32 there is no other kernel
    assert "pallas_call" in found(**limits, half=True)
    assert "pallas_call" not in found(half=True)
    assert "pallas_call" not in found(64)
    seed = np.zeros(2, "uint32")
    assert "pallas_call" not in found(**limits, dropout=0.1, dropout_seed=seed)


@ON_JAX
def test_a_few_queries_read_all_keys_without_a_loop_on_a_gpu(monkeypatch):
    import jax

    arrays = [*inputs(3, keys=600), np.array([[4, 170, 5], [0, 1, 599]], "int32")]

    def function():
        """One whose trace is not known from another platform."""
        return lambda query, key, value, limits: attention(query, key, value, limits=limits)

    expected = run(function(), *arrays)
    assert "while" in str(jax.make_jaxpr(function())(*arrays))
    for module in (api, chunked_attention):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    assert "while" not in str(jax.make_jaxpr(function())(*arrays))
    assert_close(run(function(), *arrays), expected, 2e-6)


@ON_JAX
@pytest.mark.parametrize(
    "changes, received",
    [
        ({"dropout": 0.1, "dropout_seed": np.zeros(2, "int32")}, "dropout=0.1"),
        (
            {"query": np.zeros((2, 21, HEADS, DIM), "float16")},
            "dropout.*'float16', 'float32'",
        ),
        (
            dict.fromkeys(("query", "key", "value"), np.zeros((1, 2, 1, 512), "float32")),
            "dropout.*512",
        ),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(changes, received):
    arguments = dict(zip(("query", "key", "value"), inputs(21))) | changes
    with pytest.raises(ValueError, match=f"implementation='pallas'.*Received: {received}"):
        attention(**arguments, implementation="pallas")


@pytest.mark.skipif(BACKEND == "jax", reason="the kernels are JAX's")
def test_other_backends_refuse_the_kernels():
    with pytest.raises(ValueError, match=r"implementation='pallas'.*Received: backend="):
        attention(*inputs(21), implementation="pallas")
