"""LoRA experts against the projection that they stand for, with their changes in its weights."""

import keras
import numpy as np
import pytest

from qwen3_next.layers import Adapters, LoRAExperts
from qwen3_next.layers.adapters import BLOCK_OUTPUT, build_experts, project
from qwen3_next.layers.projection import dense, from_heads, to_heads
from tests.support.running import (
    assert_close,
    assert_slopes,
    gradients,
    run,
    to_numpy,
    weight_arrays,
    with_weights,
)

RNG = np.random.default_rng(0)
BATCH, LENGTH, EXPERTS, RANK, ALPHA = 3, 4, 3, 2, 5.0
X = RNG.normal(size=(BATCH, LENGTH, 6)).astype("float32")
BY_ROW = RNG.normal(size=(BATCH, 1, EXPERTS)).astype("float32")
BY_TOKEN = RNG.normal(size=(BATCH, LENGTH, EXPERTS)).astype("float32")


def learned(output_shape=(5,), inputs=X.shape, **options):
    """Experts as if they had learned, always the same."""
    experts = LoRAExperts(EXPERTS, RANK, output_shape, alpha=ALPHA, **options)
    experts.build(inputs)
    rng = np.random.default_rng(1)
    for variable in (experts.lora_a, experts.lora_b):
        variable.assign(rng.normal(size=variable.shape))
    return experts


def by_hand(a, b, x, weights):
    """The sum over experts of weight x low-rank product, `(B, T, O)` in the dtype of the inputs."""
    flat = x.reshape(*x.shape[:2], -1)
    each = [weights[..., n, None] * (flat @ a[:, n] @ b[n]) for n in range(EXPERTS)]
    return ALPHA / RANK * sum(each)


def exact(experts, x, weights):
    return by_hand(*(array.astype("float64") for array in (*weight_arrays(experts), x, weights)))


@pytest.mark.parametrize("weights", [BY_ROW, BY_TOKEN], ids=["row", "token"])
def test_they_add_weighted_low_rank_products(weights):
    experts = learned()
    assert_close(run(experts, X, weights), exact(experts, X, weights), 1e-6)


@pytest.mark.parametrize("weights", [BY_ROW, BY_TOKEN], ids=["row", "token"])
def test_dims_behind_the_tokens_are_one_axis_on_both_sides(weights):
    experts, x = learned((5, 2), (None, None, 3, 2)), X.reshape(BATCH, LENGTH, 3, 2)
    experts.lora_b.assign(np.random.default_rng(2).normal(size=(EXPERTS, RANK, 10)))
    expected = exact(experts, x, weights).reshape(BATCH, LENGTH, 5, 2)
    assert_close(run(experts, x, weights), expected, 1e-6)


PROJECTIONS = {
    "dense": (dense(5, 0.5, "dense", "float32"), X),
    "to_heads": (to_heads(2, 5, 0.5, "to_heads", "float32"), X),
    "from_heads": (from_heads(5, 0.5, "from_heads", "float32"), X.reshape(BATCH, LENGTH, 2, 3)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_a_chosen_expert_is_its_change_of_the_weights(name, expert):
    layer, x = PROJECTIONS[name]
    plain = to_numpy(layer(x))
    experts = learned(plain.shape[2:], x.shape)
    weights = np.tile(np.eye(EXPERTS, dtype="float32")[expert], (BATCH, 1, 1))
    holder = type("Holder", (), {name: layer})()
    found = project(holder, x, name, Adapters({name: experts}, weights, {}))
    kernel = to_numpy(layer.kernel.value)
    merged = kernel + to_numpy(experts.merged(expert)).reshape(kernel.shape)
    layer.kernel.assign(merged)
    assert_close(to_numpy(found), to_numpy(layer(x)), 2e-6)
    layer.kernel.assign(kernel)
    assert np.abs(to_numpy(found) - plain).max() > 0.1


def test_a_projection_without_experts_is_what_it_was():
    layer, x = PROJECTIONS["dense"]
    holder = type("Holder", (), {"dense": layer})()
    others = Adapters({"other": learned()}, BY_ROW, {})
    for adapters in (None, others):
        found = to_numpy(project(holder, x, "dense", adapters))
        np.testing.assert_array_equal(found, to_numpy(layer(x)))


def test_new_experts_add_exactly_zero():
    experts = LoRAExperts(EXPERTS, RANK, (5,))
    np.testing.assert_array_equal(to_numpy(experts(1e3 * X, BY_TOKEN)), np.zeros((3, 4, 5)))
    assert np.abs(to_numpy(experts.lora_a.value)).max() > 0


@pytest.mark.parametrize("weights", [BY_ROW, BY_TOKEN], ids=["row", "token"])
def test_gradients_are_the_slopes(weights):
    experts = learned()
    arrays = [*weight_arrays(experts), X, weights]
    cotangent = RNG.normal(size=(BATCH, LENGTH, 5)).astype("float32")
    found = gradients(with_weights(experts), arrays, cotangent)
    assert [grad.shape for grad in found] == [array.shape for array in arrays]
    assert_slopes(by_hand, arrays, cotangent, found)


def test_outputs_are_in_the_compute_dtype():
    experts = learned(dtype="mixed_bfloat16")
    found = experts(X, BY_TOKEN)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert experts.lora_a.dtype == "float32"
    assert_close(to_numpy(found), exact(experts, X, BY_TOKEN), 0.03)


def passing(dropout):
    """One expert that gives back what it reads, but for dropout."""
    experts = LoRAExperts(1, 6, (6,), alpha=6.0, dropout=dropout)
    experts.build(X.shape)
    experts.lora_a.assign(np.eye(6)[:, None])
    experts.lora_b.assign(np.eye(6)[None])
    return experts


ALL = np.ones((BATCH, 1, 1), "float32")


def test_dropout_is_for_training_alone():
    experts = passing(0.25)
    for training in (None, False):
        assert experts.draw_dropout_seed(training) is None
        np.testing.assert_array_equal(to_numpy(experts(X, ALL, training=training)), X)
    found = to_numpy(experts(X, ALL, training=True))
    dropped = found == 0
    assert 0 < dropped.sum() < X.size / 2
    assert_close(found[~dropped], X[~dropped] / 0.75, 1e-6)
    np.testing.assert_array_equal(to_numpy(passing(0.0)(X, ALL, training=True)), X)


@pytest.mark.portable
def test_dropout_repeats_with_its_seed():
    experts = passing(0.5)
    seeds = [experts.draw_dropout_seed(True) for _ in range(2)]
    first, again, other = (
        to_numpy(experts(X, ALL, dropout_seed=seed, training=True))
        for seed in (seeds[0], seeds[0], seeds[1])
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    adapters = Adapters({"dense": experts}, ALL, {"dense": seeds[0]})
    np.testing.assert_array_equal(to_numpy(adapters.delta("dense", X)), first)
    without = Adapters({"dense": experts}, ALL, {})
    np.testing.assert_array_equal(to_numpy(without.delta("dense", X)), X)


def test_experts_are_built_for_what_their_projections_read():
    layers = {"to_heads": PROJECTIONS["to_heads"][0], "from_heads": PROJECTIONS["from_heads"][0]}
    for name in layers:
        layers[name](PROJECTIONS[name][1])
    dims = {"to_heads": (2, 5), "from_heads": (5,), BLOCK_OUTPUT: (7,)}
    experts = {name: LoRAExperts(2, 3, shape) for name, shape in dims.items()}
    build_experts(experts, layers, (None, None, 7))
    shapes = {name: (one.lora_a.shape[0], one.lora_b.shape[-1]) for name, one in experts.items()}
    assert shapes == {"to_heads": (6, 10), "from_heads": (6, 5), BLOCK_OUTPUT: (7, 7)}
    before = experts["to_heads"].lora_a
    build_experts(experts, layers, (None, None, 7))
    assert experts["to_heads"].lora_a is before


def test_experts_of_unknown_projections_are_refused():
    layers = {"to_heads": PROJECTIONS["to_heads"][0]}
    with pytest.raises(ValueError, match=r"`experts` .*'to_heads'.*Received: 'up_proj'"):
        build_experts({"up_proj": LoRAExperts(2, 3, (5,))}, layers, (None, None, 7))


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 0}, {"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}],
)
def test_bad_arguments_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        LoRAExperts(**{"num_experts": 2, "rank": 2, "output_shape": (3,), **options})
