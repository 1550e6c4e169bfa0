"""What a machine without a GPU can tell of the kernel; its numbers are in the op's own tests."""

import numpy as np
import pytest

from qwen3_next.layers import GatedDeltaNet
from qwen3_next.layers.ops import gated_delta_rule
from qwen3_next.layers.ops.gated_delta_rule import api, chunk_states_on_gpu
from tests.support.pretended_gpu import lowered_for_gpu
from tests.support.running import BACKEND

REAL, TINY = (1, 8192, 16, 32, 128, 128), (2, 5, 1, 2, 20, 8)


def shapes(batch, length, groups, heads, key_dim, value_dim):
    each = (groups, key_dim), (groups, key_dim), (heads, value_dim), (heads,), (heads,)
    return [(batch, length, *shape) for shape in each]


@pytest.mark.skipif(BACKEND != "jax", reason="the kernel is JAX's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [REAL, TINY])
def test_the_two_loops_over_chunks_are_two_kernels_on_a_gpu(sizes, dtype):
    import jax

    def loss(*arrays):
        output, _ = gated_delta_rule(*arrays, chunk_size=64, implementation="pallas")
        return output.astype("float32").sum()

    # Log decay and beta are float32, as the layer has them.
    dtypes = dtype, dtype, dtype, "float32", "float32"
    arrays = [jax.ShapeDtypeStruct(*x) for x in zip(shapes(*sizes), dtypes)]
    jaxpr, program = lowered_for_gpu(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *arrays)
    assert program.count("gpu.triton") == 2
    assert "stablehlo.while" not in program
    products = chunk_states_on_gpu.FULL if dtype == "float32" else chunk_states_on_gpu.HALF
    assert jaxpr.count(f"precision={products.algorithm}\n") == 6


@pytest.mark.skipif(BACKEND != "jax", reason="the kernel is JAX's")
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_kernel_is_what_a_gpu_runs(monkeypatch, platform):
    import jax

    monkeypatch.setattr(api, "platform", lambda: platform)
    # A function of its own, whose trace is not known from another platform.
    traced = jax.make_jaxpr(lambda *arrays: gated_delta_rule(*arrays))
    program = str(traced(*map(np.zeros, shapes(*TINY))))
    assert ("pallas_call" in program) == (platform == "gpu")


@pytest.mark.skipif(BACKEND != "jax", reason="the kernel is JAX's")
def test_a_layer_in_half_precision_multiplies_in_one_pass(monkeypatch):
    import jax

    # Its queries and keys are normalised in float32.
    layer = GatedDeltaNet(1, 2, 16, 16, dtype="bfloat16")
    layer.build((None, None, 8))
    monkeypatch.setattr(api, "platform", lambda: "gpu")
    jaxpr, _ = lowered_for_gpu(layer, jax.ShapeDtypeStruct((1, 32, 8), "bfloat16"))
    assert jaxpr.count(f"precision={chunk_states_on_gpu.HALF.algorithm}\n") == 3
    assert chunk_states_on_gpu.FULL.algorithm not in jaxpr


@pytest.mark.skipif(BACKEND == "jax", reason="the kernel is JAX's")
def test_other_backends_refuse_the_kernel():
    arrays = [np.zeros(shape, "float32") for shape in shapes(*TINY)]
    with pytest.raises(ValueError, match=r"implementation='pallas'.*Received: backend="):
        gated_delta_rule(*arrays, implementation="pallas")
