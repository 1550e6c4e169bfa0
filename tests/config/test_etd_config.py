"""Counts of layers that encode, think and decode, and the fields around them."""

from types import SimpleNamespace

import pytest

from qwen3_next import ETDConfig, LayerRouterConfig, Qwen3NextConfig


def routed(backprop_iterations=None, **fields):
    options = {"use_layer_router": True, "backprop_iterations": backprop_iterations}
    return ETDConfig(**options, layer_router=LayerRouterConfig(**fields))


def adapted(**fields):
    """A model whose only think layer is a DeltaNet."""
    etd = {"use_lora_experts": True, "lora_expert": fields}
    layers = {"n_encoder_layers": 0, "n_think_layers": 1, "n_decoder_layers": 1}
    return Qwen3NextConfig.from_variant("tiny", num_layers=2, etd={**layers, **etd})


class Profile:
    split = (1, 2, 3)


def test_the_promised_defaults():
    config = ETDConfig()
    assert config == ETDConfig(7, 4, 5, 5, True, 0.9) == ETDConfig.published_16_layers()
    ranges = {"encoder": (0, 7), "think": (7, 11), "decoder": (11, 16)}
    assert config.get_layer_ranges() == ranges
    assert ETDConfig.published_48_layers().get_layer_ranges()["think"] == (12, 36)


@pytest.mark.parametrize(
    "num_layers, split", [(48, (12, 24, 12)), (4, (1, 2, 1)), (6, (2, 2, 2)), (1, (0, 1, 0))]
)
def test_ratios_leave_no_layer_out(num_layers, split):
    config = ETDConfig.from_ratio(num_layers, 0.25, 0.5, 0.25, max_think_iterations=2)
    assert (config.n_encoder_layers, config.n_think_layers, config.n_decoder_layers) == split
    assert config.num_layers == num_layers and config.max_think_iterations == 2


def test_a_profile_gives_the_split():
    assert ETDConfig.from_profile(Profile(), max_think_iterations=3) == ETDConfig(1, 2, 3, 3)


@pytest.mark.parametrize("profile", ["a", (1, 2, 1), None, SimpleNamespace(split=(1, 2))])
def test_what_has_no_split_is_no_profile(profile):
    with pytest.raises(ValueError, match=r"`profile` must have a `split`.*Received: profile="):
        ETDConfig.from_profile(profile)


def test_it_survives_its_dict_inside_a_model():
    router, expert = {"num_windows": 3}, {"target_modules": ["out_proj"]}
    etd = ETDConfig(
        1,
        2,
        1,
        granularity="sequence",
        use_layer_router=True,
        layer_router=router,
        use_lora_experts=True,
        lora_expert=expert,
    )
    config = Qwen3NextConfig.from_variant("tiny", num_layers=4, etd=etd)
    assert Qwen3NextConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["etd"]["granularity"] == "sequence"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ETDConfig().validate(15), "7 \\+ 4 \\+ 5 = 16, num_layers=15"),
        (lambda: Qwen3NextConfig.from_variant("tiny", etd=ETDConfig()), "num_layers=6"),
        (lambda: ETDConfig(n_think_layers=0), "n_think_layers"),
        (lambda: ETDConfig(n_encoder_layers=-1), "n_encoder_layers"),
        (lambda: ETDConfig(max_think_iterations=0), "max_think_iterations"),
        (lambda: ETDConfig(confidence_threshold=0.0), "confidence_threshold"),
        (lambda: ETDConfig(confidence_threshold=1.5), "confidence_threshold"),
        (lambda: ETDConfig(granularity="batch"), "granularity"),
        (lambda: ETDConfig(inference_state="first"), "inference_state"),
        (lambda: ETDConfig(ponder_cost=0.1, adaptive_depth=False), "ponder_cost"),
        (lambda: ETDConfig(backprop_iterations=0), "backprop_iterations"),
        (lambda: ETDConfig(sample_iterations=1), "sample_iterations"),
        (lambda: ETDConfig(warmup_steps=-1), "warmup_steps"),
        (lambda: ETDConfig(input_injection=None), "input_injection"),
        (lambda: ETDConfig.from_dict({"think_layers": 2}), "think_layers"),
        (lambda: ETDConfig.from_ratio(4, 0.5, 0.5, 0.5), "sum to 1"),
        (lambda: ETDConfig.from_ratio(4, 0.5, 0.0, 0.5), "too short"),
        (lambda: ETDConfig.from_ratio(4, -0.5, 1.0, 0.5), "encoder"),
        (lambda: Qwen3NextConfig(etd="deep"), "etd"),
        (lambda: ETDConfig(router_warmup_steps=5), "use_layer_router=True"),
        (lambda: ETDConfig(num_lora_experts=2), "use_lora_experts=True"),
        (lambda: ETDConfig(use_layer_router=True, layer_router={"num_actions": 2}), "num_actions"),
        (lambda: ETDConfig(use_layer_router=True, layer_router="deep"), "layer_router"),
        (lambda: routed(temperature=0.0), "temperature"),
        (lambda: routed(window_size=0), "window_size"),
        (lambda: routed(budget_weight=1.0), "use_gumbel=True"),
        (lambda: routed(use_gumbel=True, compute_budget=0.5), "budget_weight"),
        (lambda: routed(use_gumbel=True, backprop_iterations=1), "backprop_iterations"),
        (lambda: adapted(target_modules=["q_prj"]), "target_modules"),
        (lambda: adapted(target_modules=["q_proj", "q_proj"]), "target_modules"),
        (lambda: adapted(target_modules=["q_proj"]), "none called .'q_proj'."),
        (lambda: adapted(rank=0), "rank"),
        (lambda: adapted(dropout=1.0), "dropout"),
        (lambda: adapted(granularity="batch"), "granularity"),
    ],
)
def test_wrong_values_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
