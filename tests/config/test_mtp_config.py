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
        ("draft_vocab_size", -1),
        ("draft_vocab_size", "all"),
    ],
)
def test_every_field_is_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}.*Received"):
        MTPConfig(**{field: value})


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="main_loss_weight"):
        Qwen3NextConfig(mtp={"main_loss_weight": 1.0})


def test_a_large_vocabulary_is_drafted_from_in_part():
    sizes = [32768, 32769, 151_936]
    assert [MTPConfig().draft_vocab_size_of(size) for size in sizes] == [0, 8192, 8192]
    for given in (0, 100):
        assert MTPConfig(draft_vocab_size=given).draft_vocab_size_of(151_936) == given
    with pytest.raises(ValueError, match=r"draft_vocab_size.*Received"):
        Qwen3NextConfig(vocab_size=50, mtp={"draft_vocab_size": 51})


@pytest.mark.parametrize("steps, lookahead", [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_as_many_tokens_are_drafted_as_the_head_learns(steps, lookahead):
    assert MTPConfig(num_predict_tokens=steps).speculation_lookahead == lookahead
