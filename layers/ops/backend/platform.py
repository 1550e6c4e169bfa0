"""Which implementation of an op runs where."""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import keras

BACKEND = keras.backend.backend()


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: where the active backend puts new tensors."""
    if BACKEND == "jax":
        import jax

        return jax.default_backend()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def choose(implementation: str | None, names: Sequence[str], default: str) -> str:
    """`implementation`, or `default` if it is `None`; `ValueError` if it is not one of `names`."""
    if implementation is None:
        return default
    if implementation not in names:
        raise ValueError(
            f"`implementation` must be None or one of {names}. Received: {implementation=}"
        )
    return implementation


@functools.cache
def has_pallas() -> bool:
    """Whether this is a JAX with the part of Pallas that the kernels for GPUs are written in.

    JAX 0.11 warns that a later one will be without it.
    """
    return BACKEND == "jax" and find_spec("jax.experimental.pallas.triton") is not None


def require_pallas(implementation: str) -> None:
    """Raises `ValueError` if the kernels that `implementation` means cannot run."""
    if BACKEND != "jax":
        raise ValueError(
            f"implementation={implementation!r} needs the JAX backend. "
            f"Received: backend={BACKEND!r}"
        )
    if platform() == "tpu":
        raise ValueError(
            f"implementation={implementation!r} needs a GPU, or a CPU that interprets it. "
            "Received: a TPU"
        )
    if not has_pallas():
        import jax

        raise ValueError(
            f"implementation={implementation!r} needs `jax.experimental.pallas.triton`. "
            f"Received: jax {jax.__version__}, which has none"
        )


def run_kernel(run: Callable[..., Any], *arrays: Any) -> Any:
    """`run(*arrays, interpret=...)`, a call of a Pallas kernel: interpreted on a CPU.

    That is chosen when the program is lowered, maybe for a GPU on a machine without one.
    """
    import jax

    return jax.lax.platform_dependent(
        *arrays,
        cpu=functools.partial(run, interpret=True),
        default=functools.partial(run, interpret=False),
    )
