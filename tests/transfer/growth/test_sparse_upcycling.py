"""Dense models become MoE models."""

import keras
import numpy as np
import pytest

from qwen3_next import ETDConfig, Qwen3NextClassifier
from qwen3_next.transfer.growth.sparse_upcycling import upcycle_dense_to_moe
from qwen3_next.transfer.named_weights import NamedWeights
from tests.support.grown_models import (
    IDS,
    ONE_FULL,
    PLAIN,
    all_logits,
    assert_learns,
    assert_unchanged,
    kind,
    logits_of,
    snapshot,
)
from tests.support.running import assert_close
from tests.support.small_models import logits_once, small


@pytest.mark.parametrize(("name", "shared"), [("plain", 0), ("tied", 6), ("tied_mtp", 6)])
def test_equal_experts_compute_what_the_dense_network_does(name, shared):
    model = kind(name)
    before = snapshot(model)
    sparse = upcycle_dense_to_moe(
        model, 4, router_init_std=0.5, shared_expert_intermediate_size=shared, seed=0
    )
    assert sparse.config.moe_layers == list(range(model.config.num_layers))
    assert_close(all_logits(sparse), logits_of(name), 1e-5)
    assert_unchanged(model, before)


def test_a_shared_expert_begins_silent_and_ready_to_learn():
    weights = NamedWeights(upcycle_dense_to_moe(kind("plain"), shared_expert_intermediate_size=6))
    base = "model/layers_0/mlp"
    assert not weights[f"{base}/shared_expert/down_proj/kernel"].any()
    assert not weights[f"{base}/shared_expert_gate/kernel"].any()
    assert weights[f"{base}/shared_expert/gate_proj/kernel"].std() == pytest.approx(0.2, rel=0.2)
    assert weights[f"{base}/shared_expert/up_proj/kernel"].all()


def test_noise_is_relative_and_spares_the_first_expert():
    model = kind("plain")
    dense = NamedWeights(model)
    sparse = NamedWeights(upcycle_dense_to_moe(model, 8, expert_init_noise=0.1, seed=0))
    base, width = "model/layers_0/mlp", model.config.intermediate_size
    found = {
        "gate_proj": sparse[f"{base}/experts/gate_up"][..., :width],
        "up_proj": sparse[f"{base}/experts/gate_up"][..., width:],
        "down_proj": sparse[f"{base}/experts/down"],
    }
    for name, experts in found.items():
        kernel = dense[f"{base}/{name}/kernel"]
        assert np.array_equal(experts[0], kernel)
        noise = experts[1:] - kernel
        assert noise.std() / kernel.std() == pytest.approx(0.1, rel=0.05)
        assert len({one.tobytes() for one in experts}) == 8


def test_routers_are_drawn_as_wide_as_asked():
    weights = NamedWeights(upcycle_dense_to_moe(kind("plain"), 32, router_init_std=0.3, seed=0))
    gate = weights["model/layers_0/mlp/gate/kernel"]
    assert gate.shape == (24, 32)
    assert gate.std() == pytest.approx(0.3, rel=0.1)


def test_routers_are_read_once_experts_differ():
    def change(noise):
        sparse = upcycle_dense_to_moe(kind("plain"), 4, expert_init_noise=noise, seed=0)
        before = all_logits(sparse)
        for layer in sparse.backbone.decoder_layers:
            layer.mlp.gate.kernel.assign(-layer.mlp.gate.kernel)
        return np.abs(all_logits(sparse) - before).max()

    assert change(0.0) < 1e-5
    assert change(0.5) > 1e-3


def test_a_seed_says_what_is_drawn():
    def weights(seed):
        sparse = upcycle_dense_to_moe(
            kind("plain"), 4, expert_init_noise=0.1, shared_expert_intermediate_size=4, seed=seed
        )
        return [array.tobytes() for array in NamedWeights(sparse).values()]

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_layers_may_stay_dense():
    sparse = upcycle_dense_to_moe(kind("plain"), 4, 1, layers=[1], seed=0)
    assert sparse.config.moe_layers == [1]
    assert_close(all_logits(sparse), logits_of("plain"), 1e-5)


@pytest.mark.parametrize("labels", [{}, {"num_labels": 3}])
def test_thinking_models_and_classifiers_become_sparse(labels):
    etd = ETDConfig(0, 1, 1, max_think_iterations=2)
    model = small(*([Qwen3NextClassifier] if labels else []), **PLAIN, **labels, etd=etd)
    sparse = upcycle_dense_to_moe(model, 4, seed=0)
    assert type(sparse) is type(model) and sparse.config.etd == etd
    assert_close(logits_once(sparse, IDS), logits_once(model, IDS), 1e-5)


def test_it_learns_and_is_kept(tmp_path):
    model = small(**{**PLAIN, **ONE_FULL})
    before = snapshot(model)
    sparse = upcycle_dense_to_moe(model, 2, expert_init_noise=0.1, seed=0)
    path = tmp_path / "sparse.keras"
    sparse.save(path)
    loaded = keras.saving.load_model(path)
    assert np.array_equal(all_logits(loaded), all_logits(sparse))
    assert_learns(sparse)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"expert_init_noise": -0.1}, "expert_init_noise"),
        ({"router_init_std": 0.0}, "router_init_std"),
        ({"layers": []}, "layers"),
        ({"layers": [0, 0]}, "layers"),
        ({"layers": [2]}, "layers"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        upcycle_dense_to_moe(kind("plain"), **arguments)


def test_other_models_are_refused():
    for model in (kind("hybrid"), kind("plain").backbone):
        with pytest.raises(ValueError, match="`model`"):
            upcycle_dense_to_moe(model)
