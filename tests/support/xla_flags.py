"""How XLA compiles what runs for milliseconds in a test.

Most of the suite's time would go into machine code: it is made without optimization, by the
emitters that take half as long, and in one piece, for the workers have all cores already. XLA's own
passes, on which memory and the order of operations depend, are those of any program.
"""

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


def set_xla_flags(devices: int = 1) -> None:
    """Sets the flags that the backend's XLA knows, unless there are any.

    Args:
        devices: How many devices the CPU is to stand for.
    """
    if "XLA_FLAGS" not in os.environ:  # workers have those of the process that began them
        flags = FASTER if known(FASTER) else LEVEL
        os.environ["XLA_FLAGS"] = f"{flags} {DEVICES}={devices}" if devices > 1 else flags


def known(flags: str) -> bool:
    """Whether the backend's XLA has these flags: it ends a process that names others."""
    code = FIRST_PROGRAM.get(os.environ.get("KERAS_BACKEND", "tensorflow"), "")
    environment = {**os.environ, "XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    return found.returncode == 0
