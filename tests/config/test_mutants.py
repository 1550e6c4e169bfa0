"""Nothing but our own `ValueError` comes out of the doors for configurations and data."""

import random

import pytest

from qwen3_next import (
    CrossArchTransferConfig,
    GroupedAdamW,
    HybridAttentionConfig,
    MTPConfig,
    Qwen3NextConfig,
    describe,
    pack,
    pad,
)
from qwen3_next.checkpoints.hugging_face_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)

VALUES = [None, True, 0, -1, 1, 3, 10**6, 10**400, 2.5, -0.5, float("nan"), float("inf"), 1e-40]
VALUES += ["", "a"]
VALUES += ["full_attention", b"x", [], [1], ["a"], [None], [[1]], (1, 2), {}, {"a": 1}]
PUBLISHED = "rope_parameters rope_scaling hidden_act layer_types mlp_only_layers sliding_window"
PUBLISHED += " use_sliding_window max_window_layers num_local_experts quantization_config"
TINY = Qwen3NextConfig.from_variant("tiny")


def mutant(fields, rng, others=""):
    fields = dict(fields)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*fields, *others.split(), "extra", 1, None])
        fields[name] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del fields[name]
    return fields


DOORS = {
    "config": lambda rng: Qwen3NextConfig.from_dict(mutant(TINY.to_dict(), rng)),
    "mtp": lambda rng: MTPConfig.from_dict(mutant(MTPConfig().to_dict(), rng)),
    "hybrid": lambda rng: HybridAttentionConfig.from_dict(
        mutant(HybridAttentionConfig().to_dict(), rng)
    ),
    "transfer": lambda rng: CrossArchTransferConfig.from_dict(
        mutant(CrossArchTransferConfig().to_dict(), rng)
    ),
    "config.json": lambda rng: Qwen3NextConfig.from_dict(
        config_from_hugging_face(mutant(config_to_hugging_face(TINY), rng, PUBLISHED))
    ),
    "replace": lambda rng: TINY.replace(**{rng.choice([*TINY.to_dict()]): rng.choice(VALUES)}),
    "describe": lambda rng: describe(rng.choice(VALUES)),
    "pad": lambda rng: pad(rng.choice(VALUES), rng.choice(VALUES), rng.choice(VALUES)),
    "pad length": lambda rng: pad([[1, 2], [3]], rng.choice(VALUES)),
    "pack": lambda rng: pack(rng.choice(VALUES), rng.choice([4, *VALUES])),
    "pack length": lambda rng: pack([[1, 2], [3]], rng.choice(VALUES)),
    "learning rate": lambda rng: GroupedAdamW(rng.choice(VALUES)),
    "group": lambda rng: GroupedAdamW(1e-3, {rng.choice(["(", "*", 5, None, "a", b"x"]): 1.0}),
    "multipliers": lambda rng: GroupedAdamW(1e-3, rng.choice(VALUES)),
    "multiplier": lambda rng: GroupedAdamW(1e-3, {"experts": rng.choice(VALUES)}),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_mutant_is_accepted_or_refused_by_name(door):
    rng, refused = random.Random(door), 0
    for _ in range(300):
        try:
            DOORS[door](rng)
        except ValueError as error:
            assert "Received" in str(error) or "Unknown" in str(error)
            refused += 1
    assert refused > 30
