"""The sparse MoE layer: its maths, its gradients, its padding and its balance."""

import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next import layers
from tests.support import oracles
from tests.support.layers import FIXTURES, WIDTH, inputs_of, subject, tokens
from tests.support.running import (
    assert_close,
    assert_slopes,
    gradients,
    run,
    to_numpy,
    to_tensors,
    weight_arrays,
    with_weights,
)

CASES = {
    "top 1": (1, False, 0),
    "top 1 normed": (1, True, 0),
    "top 2": (2, False, 6),
    "top 2 normed": (2, True, 6),
    "all": (8, True, 0),
}
X = tokens()[:2, :6]
MASK = np.array([[0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], bool)


@functools.cache
def moe_of(case):
    top_k, normed, shared = CASES[case]
    layer = layers.SparseMoE(8, top_k, 5, shared, norm_topk_prob=normed, initializer_range=0.4)
    layer.build(X.shape)
    return layer


def moe_oracle(case):
    top_k, normed, _ = CASES[case]

    def function(router, gate_up, down, *rest):
        *shared, x = rest
        x = np.float64(x).reshape(-1, WIDTH)
        return oracles.sparse_moe(x, router, gate_up, down, top_k, normed, shared or None)

    return function


def test_routing_agrees_with_the_published_one():
    x = inputs_of("sparse_moe")[0]
    layer = subject("sparse_moe").layer
    _, routing = run(lambda x: layer(x, return_routing=True), x)
    logits = FIXTURES["sparse_moe/out/router_logits"].astype("float64")
    chosen = FIXTURES["sparse_moe/out/chosen"]
    assert routing[0].tolist() == np.bincount(chosen.ravel(), minlength=8).tolist()
    assert_close(routing[1], oracles._softmax(logits).sum(0), 1e-5)
    assert routing[2] == 12


@pytest.mark.parametrize("case", CASES)
def test_moe_matches_the_oracle(case):
    layer = moe_of(case)
    output, probabilities, chosen = moe_oracle(case)(*weight_arrays(layer), X)
    found, routing = run(functools.partial(layer, return_routing=True), X)
    assert_close(found, output.reshape(X.shape), 1e-5)
    assert_close(routing[0], np.bincount(chosen.ravel(), minlength=8), 0)
    assert_close(routing[1], probabilities.sum(0), 1e-5)
    assert routing[2] == 12


@pytest.mark.parametrize("case", ["top 1", "top 1 normed", "top 2 normed"])
def test_gradients_reach_the_router_and_the_experts_in_use_only(case):
    layer = moe_of(case)
    arrays = [*weight_arrays(layer), X]
    cotangent = np.random.default_rng(1).normal(size=X.shape).astype("float32")
    grads = gradients(with_weights(layer), arrays, cotangent)
    if case != "top 1 normed":
        flat_cotangent = cotangent.reshape(-1, WIDTH)
        assert_slopes(
            lambda *arrays: moe_oracle(case)(*arrays)[0],
            arrays,
            flat_cotangent,
            [*grads[:-1], None] if case == "top 1" else grads,
        )
    assert np.abs(grads[0]).max() > 1e-3
    chosen = moe_oracle(case)(*arrays)[2]
    unused = np.setdiff1d(np.arange(8), chosen)
    assert not grads[1][unused].any()
    assert not grads[2][unused].any()
    assert grads[1][np.unique(chosen)].any(axis=(1, 2)).all()


def test_the_router_of_a_normed_top_1_learns_as_if_the_sum_were_constant():
    layer = moe_of("top 1 normed")
    arrays = [*weight_arrays(layer), X]
    cotangent = np.random.default_rng(1).normal(size=X.shape).astype("float32")
    grads = gradients(with_weights(layer), arrays, cotangent)
    constant = moe_oracle("top 1")(*arrays)[1].max(-1, keepdims=True)

    def surrogate(*arrays):
        return moe_oracle("top 1")(*arrays)[0] / constant

    assert_slopes(surrogate, arrays, cotangent.reshape(-1, WIDTH), [grads[0]])


def test_padding_is_routed_nowhere():
    layer = moe_of("top 2")
    noisy = X.copy()
    noisy[~MASK] = 50.0

    def routed(x, mask):
        return layer(x, padding_mask=mask, return_routing=True)

    output, (per_expert, probability, count) = run(routed, noisy, MASK)
    expected, probabilities, chosen = moe_oracle("top 2")(*weight_arrays(layer), X)
    real = MASK.ravel()
    assert_close(output[MASK], expected[real], 1e-5)
    assert per_expert.tolist() == np.bincount(chosen[real].ravel(), minlength=8).tolist()
    assert_close(probability, probabilities[real].sum(0), 1e-5)
    assert count == real.sum()
    assert per_expert.sum() == 2 * real.sum()

    *_, (per_expert, probability, count) = run(routed, noisy, np.zeros_like(MASK))
    assert not per_expert.any() and not probability.any() and count == 0


def test_load_balancing_loss_matches_the_oracle():
    rng = np.random.default_rng(0)
    probabilities = [rng.dirichlet(np.ones(8), 12) for _ in range(2)]
    chosen = [np.argsort(-p, axis=1)[:, :2] for p in probabilities]
    real = MASK.ravel()
    routings = [
        layers.Routing(
            np.bincount(c[real].ravel(), minlength=8).astype("float32"),
            p[real].sum(0).astype("float32"),
            np.float32(real.sum()),
        )
        for p, c in zip(probabilities, chosen, strict=True)
    ]
    loss = run(lambda *r: layers.load_balancing_loss(iter(r)), *routings)
    assert_close(loss, oracles.load_balancing_loss(probabilities, chosen, MASK), 1e-6)
    by_layer = run(lambda *r: layers.load_balancing_loss(r, by_layer=True), *routings)
    each = [oracles.load_balancing_loss([p], [c], MASK) for p, c in zip(probabilities, chosen)]
    assert_close(by_layer, np.mean(each), 1e-6)
    assert abs(loss - by_layer) > 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_balanced_router_has_the_smallest_loss(top_k):
    def loss(per_expert, probability):
        per_expert, probability = np.float32(per_expert), np.float32(probability)
        routing = layers.Routing(per_expert, probability, np.float32(16))
        return float(to_numpy(layers.load_balancing_loss([to_tensors(routing)])))

    even = np.full(8, 2.0)
    assert loss(top_k * even, even) == pytest.approx(top_k)
    skewed = np.array([4, 4, 3, 1, 1, 1, 1, 1])
    assert loss(top_k * skewed, skewed) > top_k + 0.1
    assert loss(np.zeros(8), np.zeros(8)) == 0


def test_tokens_per_expert_carry_no_gradient():
    per_expert, probability = np.full(8, 3.0, "float32"), np.full(8, 1.5, "float32")

    def loss(per_expert, probability):
        return layers.load_balancing_loss([layers.Routing(per_expert, probability, ops.ones(()))])

    grads = gradients(
        lambda p: loss(ops.convert_to_tensor(per_expert), p), [probability], np.float32(1)
    )
    assert_close(grads[0], 8 * per_expert, 1e-6)
