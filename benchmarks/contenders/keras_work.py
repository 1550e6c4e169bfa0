"""Compiling and running on the Keras backend of the process, the same way for both contenders."""

import keras
from keras import ops

from benchmarks.contenders import Work

BACKEND = keras.backend.backend()


def forward(function, variables, *inputs, **extras):
    """`Work` that runs `function(*inputs)`, compiled, with the values of `variables`."""
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    return _work(function, variables, inputs, **extras)


def gradient(function, variables, *inputs, **extras):
    """`Work` for the gradient of `sum(function(*inputs))` by the float inputs and variables."""
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    floats = [
        i for i, x in enumerate(inputs) if "float" in keras.backend.standardize_dtype(x.dtype)
    ]
    if BACKEND == "jax":
        import jax

        def total(values, *inputs):
            return ops.sum(with_values(function, variables, values)(*inputs))

        grad = jax.value_and_grad(total, argnums=(0, *(i + 1 for i in floats)))
        return _jax(grad, variables, inputs, **extras)

    import tensorflow as tf

    def grad(*inputs):
        with tf.GradientTape() as tape:
            tape.watch([inputs[i] for i in floats])
            total = ops.sum(function(*inputs))
        sources = [inputs[i] for i in floats] + [v.value for v in variables]
        return total, tape.gradient(total, sources)

    return _tensorflow(grad, inputs, **extras)


def train(model, inputs, labels):
    """`Work` of `train_on_batch`."""
    return Work(lambda: model.train_on_batch(inputs, labels))


def predict(model, inputs):
    """`Work` of `predict` on one batch."""
    return Work(lambda: model.predict(inputs, verbose=0))


def fit(model, inputs, labels):
    """`Work` of `fit` for one step."""
    return Work(lambda: model.fit(inputs, labels, verbose=0))


def _work(function, variables, inputs, **extras):
    if BACKEND == "jax":
        return _jax(
            lambda values, *xs: with_values(function, variables, values)(*xs),
            variables,
            inputs,
            **extras,
        )
    return _tensorflow(function, inputs, **extras)


def with_values(function, variables, values):
    def call(*inputs):
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function(*inputs)

    return call


def _jax(function, variables, inputs, **extras):
    import jax

    values = [variable.value for variable in variables]
    program = []

    def run():
        if not program:
            program.append(jax.jit(function).lower(values, *inputs).compile())
        return jax.block_until_ready(program[0](values, *inputs))

    return Work(run, temp_bytes=lambda: program[0].memory_analysis().temp_size_in_bytes, **extras)


def _tensorflow(function, inputs, **extras):
    import tensorflow as tf

    program = tf.function(function, jit_compile=True, autograph=False)
    return Work(lambda: tf.nest.map_structure(_wait, program(*inputs)), **extras)


def _wait(x):
    return None if x is None else x.numpy()
