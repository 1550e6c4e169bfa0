"""A (forward, backward) pair is differentiated in every way, whichever came before."""

import keras
import numpy as np
import pytest
from keras import ops

from qwen3_next.layers.ops.backend.autodiff import custom_gradient
from qwen3_next.layers.ops.backend.loops import scan
from tests.support.running import MODES, assert_close, gradients

X = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
COTANGENT = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")


def forward(x):
    def step(carry, xs):
        return (carry[0] + xs[0],), (carry[0] + xs[0],)

    _, (sums,) = scan(step, (ops.zeros_like(x[0]),), (x,), (ops.zeros_like(x),))
    return sums**2, sums


def backward(sums, d_squares):
    return (ops.flip(ops.cumsum(ops.flip(2 * sums * d_squares, 0), 0), 0),)


squares_of_sums = custom_gradient(forward, backward)


def test_gradients_are_the_same_eagerly_after_a_program():
    sums = np.cumsum(np.float64(X), axis=0)
    expected = np.cumsum((2 * sums * COTANGENT)[::-1], axis=0)[::-1]
    for mode in (*reversed(MODES), *MODES):
        (found,) = gradients(squares_of_sums, (X,), COTANGENT, mode=mode)
        assert_close(found, expected, 1e-6)


def quotient_forward(x, y):
    quotient = x / y
    return quotient, (y, quotient, x)


def quotient_backward(residuals, d_quotient):
    y, quotient, x = residuals
    return d_quotient / y, -d_quotient * quotient**2 / x


quotient = custom_gradient(quotient_forward, quotient_backward)


def test_residuals_may_be_inputs_in_any_order():
    x, y = np.float64(X), 1 + np.float64(COTANGENT) ** 2
    for mode in MODES:
        found = gradients(quotient, (X, y.astype("float32")), COTANGENT, mode=mode)
        assert_close(found[0], COTANGENT / y, 1e-6)
        assert_close(found[1], -COTANGENT * x / y**2, 1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="programs of TensorFlow")
def test_a_compiled_program_returns_none_of_its_inputs():
    # It would return copies: of all experts of a layer, for one.
    tf = pytest.importorskip("tensorflow")
    graph = tf.function(quotient).get_concrete_function(X, X).graph.as_graph_def()
    programs = [f for f in graph.library.function if f.attr["_XlaMustCompile"].b]
    assert [len(found.signature.output_arg) for found in programs] == [2]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tapes of TensorFlow")
def test_gradients_of_a_persistent_tape_are_those_of_another():
    tf = pytest.importorskip("tensorflow")
    (expected,) = gradients(squares_of_sums, (X,), COTANGENT)

    def gradients_of_one(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            loss = tf.reduce_sum(squares_of_sums(x) * COTANGENT)
        return tape.gradient(loss, x), tape.gradient(loss, x)

    def gradients_of_two(x):
        with tf.GradientTape() as outer, tf.GradientTape() as tape:
            outer.watch(x)
            tape.watch(x)
            loss = tf.reduce_sum(squares_of_sums(x) * COTANGENT)
        return tape.gradient(loss, x), outer.gradient(loss, x)

    for function in (gradients_of_one, gradients_of_two):
        for mode in (function, tf.function(function), tf.function(function, jit_compile=True)):
            for found in mode(tf.constant(X)):
                assert_close(found.numpy(), expected, 1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tapes of TensorFlow")
def test_gradients_of_gradients_are_refused():
    tf = pytest.importorskip("tensorflow")

    def gradient_of_gradient(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(squares_of_sums(x))
            slope = tape.gradient(loss, x)
        return outer.gradient(slope, x)

    for mode in (gradient_of_gradient, tf.function(gradient_of_gradient)):
        with pytest.raises(ValueError, match="Gradients of gradients are not available"):
            mode(tf.constant(X))
