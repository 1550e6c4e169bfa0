"""This project on JAX in bfloat16."""

import contextlib
from math import prod
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import floors
from benchmarks.contenders import Work, token_ids
from benchmarks.contenders.keras_work import with_values
from qwen3_next import Qwen3Next, Qwen3NextConfig
from qwen3_next.layers import SparseMoE
from qwen3_next.layers.initializers import Normal
from qwen3_next.layers.ops import attention as attend
from qwen3_next.layers.ops import gated_delta_rule

DTYPE = "bfloat16"
ON_HOST = 2**25  # numbers that the host draws sooner than a program for them is compiled


def sees_gpu():
    return jax.default_backend() == "gpu"


def delta_rule(length, key_heads, heads, dim, backward=False):
    """Beta and log decay are float32, as the layer has them."""
    query, key, value = _normal((key_heads, key_heads, heads), length, dim)
    query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    beta, speed = (jax.random.uniform(jax.random.key(i), (1, length, heads)) for i in range(2))
    inputs = [query, key, value, -0.1 * speed, beta]
    floor = floors.delta_rule(length, key_heads, heads, dim, backward)
    return _work(lambda *inputs: gated_delta_rule(*inputs).output, [], inputs, floor, backward)


def moe(tokens, width, experts, chosen, inner, shared, backward=False):
    layer = SparseMoE(experts, chosen, inner, shared, dtype=DTYPE)
    with drawn_on_device():
        layer.build((None, None, width))
    rows = jax.random.normal(jax.random.key(0), (1, tokens, width), DTYPE)
    floor = floors.moe(tokens, width, experts, chosen, inner, shared, backward)
    return _work(layer, layer.variables, [rows], floor, backward)


def attention(length, heads, groups, dim, backward=False):
    inputs = _normal((heads, groups, groups), length, dim)
    floor = floors.attention(length, heads, groups, dim, backward)
    return _work(attend, [], inputs, floor, backward)


def prefill(config, batch, length, backward=False):
    model, ids = _build(config), jnp.asarray(token_ids(config, batch, length))
    floor = floors.model(config, batch, length, backward)
    return _work(model, model.variables, [ids], floor, backward)


def gradients(config, batch, length):
    """Of all weights."""
    return prefill(config, batch, length, backward=True)


def decode(config, batch, length, new):
    model, ids = _build(config), token_ids(config, batch, length)

    def run(times=1):
        for _ in range(times):
            found = model.generate(ids, new)
        return found

    notes = _notes(floors.decode(config, batch, length, new))
    return Work(run, units=batch * new, notes=notes)


def _build(config):
    with drawn_on_device():
        return Qwen3Next(Qwen3NextConfig.from_dict(config), dtype=DTYPE)


@contextlib.contextmanager
def drawn_on_device():
    """Within it large weights are drawn where they stay: the host would take half a minute."""
    on_host = Normal.__call__
    draw = jax.jit(
        lambda shape, dtype, std: jax.random.normal(jax.random.key(0), shape, dtype) * std,
        static_argnums=(0, 1, 2),
    )

    def choose(self, shape, dtype=None, layout=None):
        if prod(shape) < ON_HOST:
            return on_host(self, shape, dtype, layout)
        return draw(tuple(shape), dtype, self.stddev)

    with mock.patch.object(Normal, "__call__", choose):
        yield


def _normal(heads, length, dim):
    """Arrays `(1, length, n, dim)`, one for each number of heads."""
    return [
        jax.random.normal(jax.random.key(i), (1, length, n, dim), DTYPE)
        for i, n in enumerate(heads)
    ]


def _work(function, variables, inputs, floor, backward):
    """`Work` of a program that is given all arrays; backwards it has gradients of all floats."""
    count = len(variables)
    arrays = [*(variable.value for variable in variables), *inputs]

    def call(*arrays):
        return with_values(function, variables, arrays[:count])(*arrays[count:])

    if backward:
        arrays.append(_gradient_of(call, arrays))
    program = []

    def run(times=1):
        if not program:
            launch = jax.jit(_both(call, arrays) if backward else call)
            program.append(launch.lower(*arrays).compile())
        for _ in range(times):
            found = None  # or two results would be held at once
            found = program[0](*arrays)
        return jax.block_until_ready(found)

    return Work(
        run,
        temp_bytes=lambda: program[0].memory_analysis().temp_size_in_bytes,
        notes=_notes(floor),
    )


def _gradient_of(call, arrays):
    """One of the output, in whose place the compiler can put nothing simpler."""
    output = jax.eval_shape(call, *arrays)
    return jax.random.normal(jax.random.key(9), output.shape, output.dtype)


def _both(call, arrays):
    """`f(*arrays, output_gradient)`: the output, and the gradients of all floats among arrays."""
    floats = [i for i, x in enumerate(arrays[:-1]) if jnp.issubdtype(x.dtype, jnp.floating)]

    def both(*arrays):
        *arrays, output_gradient = arrays

        def of_floats(*values):
            found = dict(enumerate(arrays)) | dict(zip(floats, values))
            return call(*found.values())

        output, pull = jax.vjp(of_floats, *(arrays[i] for i in floats))
        return output, pull(output_gradient)

    return both


def _notes(floor):
    """The floor and the most memory that JAX had on the GPU."""

    def found():
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return {**floor, **({} if peak is None else {"device_mib": peak / 2**20})}

    return found
