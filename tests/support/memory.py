"""Frees what a test module has compiled."""

import gc
import sys

import keras


def free_programs():
    """Drops all models that tests share and all programs; the next module compiles its own."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    keras.utils.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
