"""The configuration of multi-token prediction."""

import pytest

from qwen3_next import MTPConfig, Qwen3NextConfig


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_predict_tokens", 0),
        ("mtp_head_type", "medusa"),
        ("loss_weight_decay", 0.0),
        ("mtp_loss_weight", -1.0),
        ("speculation_lookahead", 5),
        ("hidden_state", "middle"),
        ("sequential_forward", 1),
        ("warmup_steps", -1),
        ("share_weights_across_steps", None),
    ],
)
def test_every_field_is_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}.*Received"):
        MTPConfig(**{field: value})


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="main_loss_weight"):
        Qwen3NextConfig(mtp={"main_loss_weight": 1.0})
