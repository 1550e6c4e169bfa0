"""What a machine without a GPU can tell of the kernels for one."""

import contextlib


def lowered_for_gpu(function, *arrays):
    """`(jaxpr, program)` of a function of arrays or their shapes, as text, for a CUDA GPU."""
    import jax

    with _some_gpu():
        traced = jax.jit(function).trace(*arrays)
        return str(traced.jaxpr), traced.lower(lowering_platforms=("cuda",)).as_text()


def _some_gpu():
    """Newer versions of JAX ask which GPU a kernel is for."""
    import jax

    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
