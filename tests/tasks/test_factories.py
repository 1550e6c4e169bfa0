"""Models by name, for a task and with some of a variant's choices changed."""

import pytest

from qwen3_next import Qwen3Next, create_qwen3_next, create_qwen3_next_with_advanced_features


def test_factories_build_what_they_are_asked_for():
    few = {"vocab_size": 64, "num_layers": 1, "hidden_size": 32}
    assert create_qwen3_next("tiny", **few).config.hidden_size == 32
    classifier = create_qwen3_next("tiny", task_type="classification", num_labels=3, **few)
    assert classifier.num_labels == 3
    with pytest.raises(ValueError, match="num_labels"):
        create_qwen3_next("tiny", task_type="classification", **few)
    with pytest.raises(ValueError, match="num_labels"):
        create_qwen3_next("tiny", num_labels=3, **few)
    with pytest.raises(ValueError, match="task_type"):
        create_qwen3_next("tiny", task_type="translation")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"task_type": "classification", "num_labels": 3, "freeze_backbone": True}, "Qwen3Next"),
        ({"pad_token_id": 0}, "Qwen3NextClassifier"),
    ],
)
def test_an_argument_of_another_task_is_refused_by_where_it_belongs(options, name):
    with pytest.raises(ValueError, match=f"argument of `{name}`.*Received"):
        create_qwen3_next("tiny", **options)


def test_advanced_features_are_keyword_arguments_of_the_model():
    fields = create_qwen3_next_with_advanced_features(
        "tiny",
        num_experts=8,
        experts_per_token=2,
        normalization_type="rms_norm",
        attention_type="group_query_attention",
        ffn_type="geglu",
    )
    fields |= {"vocab_size": 64, "hidden_size": 32}
    config = Qwen3Next(**fields).config
    assert (config.num_experts, config.num_experts_per_tok, config.ffn_type) == (8, 2, "geglu")
    with pytest.raises(ValueError, match="experts"):
        create_qwen3_next_with_advanced_features("tiny", experts_per_token=5)
