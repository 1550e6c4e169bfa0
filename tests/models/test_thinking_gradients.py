"""Gradients through the think loop, and what they cost."""

import dataclasses
import functools

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, LayerRouterConfig, LoRAExpertConfig, Qwen3NextBackbone
from qwen3_next.training.thinking_metrics import ponder_loss
from tests.support import float64_model
from tests.support.running import (
    BACKEND,
    MODES,
    assert_close,
    assert_slopes,
    gradients,
    run,
    to_tensors,
    weight_arrays,
    weight_gradients,
    with_weights,
)
from tests.support.thinking_models import FIXED

TOY = {
    "vocab_size": 7,
    "hidden_size": 8,
    "num_layers": 1,
    "layer_types": ("full_attention",),
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "partial_rotary_factor": 1.0,
    "intermediate_size": 6,
    "num_experts": 0,
    "mlp_only_layers": (),
    "initializer_range": 0.5,
}
ONE = {
    "n_encoder_layers": 0,
    "n_think_layers": 1,
    "n_decoder_layers": 0,
    "confidence_threshold": 0.8,
}
X = np.random.default_rng(2).normal(size=(2, 5, 8)).astype("float32")
COTANGENT = np.random.default_rng(3).normal(size=X.shape).astype("float32")


@functools.cache
def toy(gradient_checkpointing=False, **etd):
    keras.utils.set_random_seed(5)
    config = {**TOY, "etd": {**ONE, "max_think_iterations": 3, **etd}}
    model = Qwen3NextBackbone(**config, gradient_checkpointing=gradient_checkpointing, name="model")
    unit = model.think_loop.halting_unit
    if unit is not None:
        unit.score.kernel.assign(np.random.default_rng(7).normal(size=(8, 1)) * 0.5)
    return model


@functools.cache
def trained(model):
    return lambda x: model.think_loop(x, training=True)


@functools.cache
def loop_of_weights(model):
    return with_weights(model.think_loop, trained(model))


def loop_gradients(model, mode):
    arrays = [*weight_arrays(model.think_loop), X]
    return gradients(loop_of_weights(model), arrays, COTANGENT, mode)


def oracle(model, iterations, start=None):
    paths = [v.path for v in model.think_loop.trainable_variables]

    def function(*arrays):
        weights = {p: np.asarray(a, np.float64) for p, a in zip(paths, arrays)}
        x = np.asarray(arrays[-1] if start is None else start, np.float64)
        return float64_model.think_loop(weights, model.config, x, iterations)[0]

    return function


@pytest.mark.parametrize(
    ("etd", "mode"),
    [*(pytest.param({}, m, id=m) for m in MODES), pytest.param(FIXED, MODES[-1], id="fixed")],
)
def test_gradients_are_slopes(etd, mode):
    model = toy(**etd)
    found = loop_gradients(model, mode)
    arrays = [*weight_arrays(model.think_loop), X]
    assert_slopes(oracle(model, 3), arrays, COTANGENT, found)
    if not etd:  # the halting unit learns
        by_path = dict(zip([v.path for v in model.think_loop.trainable_variables], found))
        assert np.abs(by_path["model/think_loop/halting_unit/score/kernel"]).max() > 1e-3


def test_truncated_gradients_are_those_of_the_last_iterations():
    model = toy(**FIXED, backprop_iterations=1)
    *found, by_x = loop_gradients(model, MODES[-1])
    assert by_x is None or not by_x.any()
    weights = weight_arrays(model.think_loop)
    before = oracle(model, 2)(*weights, X)
    assert_slopes(oracle(model, 1, start=before), weights, COTANGENT, found)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_no_gradient(mode):
    *kept, _ = loop_gradients(toy(), mode)
    model = toy(gradient_checkpointing=True)
    recomputed = weight_gradients(model.think_loop, trained(model), X, COTANGENT, mode)
    for one, other in zip(kept, recomputed, strict=True):
        assert_close(other, one, 1e-6)


# A value for every field of `ETDConfig` that must change the weights, an output or a gradient.
CHANGES = {
    "n_encoder_layers": 1,
    "n_think_layers": 2,
    "n_decoder_layers": 1,
    "max_think_iterations": 2,
    "adaptive_depth": False,
    "confidence_threshold": 0.4,
    "granularity": "sequence",
    "inference_state": "final",
    "ponder_cost": 0.3,
    "backprop_iterations": 1,
    "sample_iterations": True,
    "warmup_steps": 5,
    "input_injection": True,
    "use_layer_router": True,
    "layer_router": LayerRouterConfig(hidden_size=8),
    "router_warmup_steps": 5,
    "use_lora_experts": True,
    "num_lora_experts": 2,
    "lora_expert": LoRAExpertConfig(rank=2),
    "expert_warmup_steps": 5,
}


def what_it_does(**etd):
    """Yields paths of weights, the output at inference, and gradients of the training loss."""
    model = toy(**etd)
    yield [v.path for v in model.weights]
    loop, ids = model.think_loop, np.arange(6).reshape(2, 3)

    def training_loss(x):
        output = loop(x, full_output=True, training=True)
        cost = ponder_loss(model.config, output.thinking)
        return keras.ops.sum(output.hidden) + (0.0 if cost is None else cost)

    yield run(model, ids)
    yield from weight_gradients(loop, training_loss, X, np.ones((), "float32"))


@functools.cache
def base():
    return list(what_it_does())


@pytest.mark.skipif(BACKEND != "jax", reason="a property of the configuration")
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ETDConfig)])
def test_every_field_is_live(field):
    try:
        found = what_it_does(**{field: CHANGES[field]})
        assert not all(map(np.array_equal, found, base()))  # computed up to the first difference
    except ValueError as error:
        assert field in str(error)


@pytest.mark.skipif(BACKEND == "torch", reason="torch has no program")
@pytest.mark.parametrize("kind", ["fixed", "token"])
def test_a_program_does_not_grow_with_the_iterations(kind):
    model = toy(max_think_iterations=8, **{"fixed": FIXED, "token": {}}[kind])
    sizes = [operations(model, iterations) for iterations in (2, 8)]
    assert sizes[1] <= sizes[0] * 1.02


def operations(model, iterations):
    """Operations of the forward and backward pass through the backbone."""
    ids = np.ones((2, 8), "int32")

    def loss(*weights):
        hidden = with_weights(model, lambda: model(ids, think_iterations=iterations))(*weights)
        return keras.ops.sum(hidden)

    weights = to_tensors(weight_arrays(model))
    if BACKEND == "jax":
        import jax

        argnums = tuple(range(len(weights)))
        return jax.jit(jax.grad(loss, argnums)).lower(*weights).as_text().count("\n")
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradient(weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = loss(*weights)
        return tape.gradient(value, weights)

    graph = gradient.get_concrete_function(weights).graph.as_graph_def()
    return len(graph.node) + sum(len(f.node_def) for f in graph.library.function)
