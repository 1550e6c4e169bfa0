"""How XLA compiles what runs for milliseconds in a test.

Most of the suite's time would go into machine code: it is made without optimization, by the
emitters that take half as long, and in one piece, for the workers have all cores already. XLA's own
passes, on which memory and the order of operations depend, are those of any program.
"""

import importlib.util
import os
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count"
LEVEL = "--xla_backend_optimization_level=0"
FASTER = f"{LEVEL} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FIRST_PROGRAM = {
    "jax": "import jax; jax.numpy.zeros(()) + 1",
    "tensorflow": "import tensorflow as tf; tf.function(lambda: tf.zeros(()), jit_compile=True)()",
}


def set_xla_flags(devices: int, cache) -> None:
    """Sets the flags that the backend's XLA knows, unless there are any.

    Args:
        devices: How many devices the CPU is to stand for.
        cache: pytest's, or `None`: to ask the backend takes seconds, and all processes ask it.
    """
    if "XLA_FLAGS" in os.environ:
        return
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    key = f"xla_flags/{installed(backend)}"
    found = cache.get(key, None) if cache else None
    if found is None:
        found = known(FASTER, backend)
        if cache:
            cache.set(key, found)
    flags = FASTER if found else LEVEL
    os.environ["XLA_FLAGS"] = f"{flags} {DEVICES}={devices}" if devices > 1 else flags


def installed(backend: str) -> str:
    """The backend as it is installed here, without importing it: what another one is not."""
    spec = importlib.util.find_spec({"jax": "jaxlib"}.get(backend, backend))
    assert spec and spec.origin, f"KERAS_BACKEND={backend} is not installed"
    return f"{backend}-{os.stat(spec.origin).st_mtime_ns}"


def known(flags: str, backend: str) -> bool:
    """Whether the backend's XLA has these flags: it ends a process that names others."""
    code = FIRST_PROGRAM.get(backend, "")
    environment = {**os.environ, "XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    return found.returncode == 0
