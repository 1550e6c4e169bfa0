"""Weighted sums of models and of task vectors, and which models can be merged at all."""

import copy
import functools

import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3NextClassifier, Qwen3NextConfig
from qwen3_next.transfer.merge.mergeable import FREE_FIELDS, require_same_function
from qwen3_next.transfer.merge.task_arithmetic import merge_linear, merge_task_arithmetic
from tests.support.merge_models import (
    assert_same_function,
    assert_weights,
    base,
    bits_of,
    changed,
    refused,
    weights_of,
    with_noise,
    with_weights_of,
)
from tests.support.small_models import SMALL, TWO_LAYERS, small
from tests.support.thinking_models import ETD

DENSE = {"num_experts": 0, "num_layers": 1, "layer_types": ("full_attention",)}
DENSE = {**DENSE, "mlp_only_layers": ()}
FREE_VALUES = {
    "router_aux_loss_scope": "layer",
    "sequential_forward": False,
    "sample_iterations": True,
    "use_gumbel": True,
    "max_position_embeddings": 128,
    "backprop_iterations": None,
}


def sum_of(arrays, weights):
    return {path: sum(w * a[path] for w, a in zip(weights, arrays)) for path in arrays[0]}


def test_the_mean_of_models_is_weighted():
    models = [base(), changed(1), changed(2)]
    expected = sum_of([weights_of(m) for m in models], (0.5, 0.375, 0.125))
    assert_weights(merge_linear(models, [4, 3, 1]), expected)


def test_without_normalisation_weights_are_factors():
    expected = sum_of([weights_of(base()), weights_of(changed(1))], (2, -0.5))
    assert_weights(merge_linear([base(), changed(1)], [2, -0.5], normalize=False), expected)


def test_the_mean_of_one_model_is_that_model():
    assert bits_of(merge_linear([changed(1)], [0.3])) == bits_of(changed(1))


def test_task_vectors_are_added_and_not_divided_by_their_number():
    start, first, second = (weights_of(m) for m in (base(), changed(1), changed(2)))
    expected = sum_of([start, first, second], (1 - 1.1 + 0.3, 1.1, -0.3))
    assert_weights(merge_task_arithmetic(base(), [changed(1), changed(2)], [1.1, -0.3]), expected)


def test_task_vectors_may_be_normalised_and_scaled():
    start, first, second = (weights_of(m) for m in (base(), changed(1), changed(2)))
    expected = sum_of([start, first, second], (0.5, 0.125, 0.375))
    merged = merge_task_arithmetic(
        base(), [changed(1), changed(2)], [2, 6], normalize=True, scale=0.5
    )
    assert_weights(merged, expected)


def test_one_task_vector_of_weight_1_gives_the_model():
    merged = merge_task_arithmetic(base(), [changed(1)], [1])
    assert_weights(merged, weights_of(changed(1)))
    assert_same_function(merged, changed(1))


def test_a_task_is_taken_away_again():
    both = merge_task_arithmetic(base(), [changed(1), changed(2)], [1, 1])
    back = merge_task_arithmetic(both, [merge_linear([base()], [1])], [0.0])
    assert bits_of(back) == bits_of(both)
    without = merge_linear([both, changed(2), base()], [1, -1, 1], normalize=False)
    assert_weights(without, weights_of(changed(1)), 2e-6)


def test_the_order_of_models_does_not_matter():
    there = merge_task_arithmetic(base(), [changed(1), changed(2), changed(3)], [1, 2, 3])
    back = merge_task_arithmetic(base(), [changed(3), changed(1), changed(2)], [3, 1, 2])
    assert_weights(there, weights_of(back))


def test_weights_by_part_and_layer():
    weights = [{"embedding": 2.0, "*": [0.0, 1.0]}, 0.0]
    start, first = weights_of(base()), weights_of(changed(1))
    found = weights_of(merge_task_arithmetic(base(), [changed(1), changed(2)], weights))
    for path, weight in (
        ("model/embed_tokens/embeddings", 2),
        ("model/layers_0/linear_attn/A_log", 0),
        ("model/layers_1/self_attn/k_norm/weight", 1),
    ):
        expected = start[path] + weight * (first[path] - start[path])
        np.testing.assert_allclose(found[path], expected, atol=1e-6)


def test_sums_of_bfloat16_models_are_rounded_once():
    narrow = small(**DENSE, dtype="bfloat16")
    models = [with_noise(narrow, seed, 0.02) for seed in range(3)]
    merged = merge_task_arithmetic(narrow, models, [0.3, 0.3, 0.3])
    assert merged.dtype_policy == narrow.dtype_policy
    start, *others = (weights_of(m) for m in (narrow, *models))
    for path, found in weights_of(merged).items():
        exact = start[path] + 0.3 * sum(other[path] - start[path] for other in others)
        np.testing.assert_allclose(found, exact, rtol=1.001 * 2**-8, atol=1e-7)


def test_models_of_several_dtypes_give_the_dtype_of_the_first():
    narrow, wide = small(**DENSE, dtype="bfloat16"), small(**DENSE)
    assert merge_linear([wide, narrow], [1, 1]).dtype_policy == wide.dtype_policy
    assert merge_linear([narrow, wide], [1, 1]).dtype_policy == narrow.dtype_policy


def test_the_models_stay_as_they_are():
    models = [with_noise(base(), seed) for seed in (5, 6, 7)]
    before = [bits_of(model) for model in models]
    merge_linear(models, [1, 1, 1])
    merged = merge_task_arithmetic(models[0], models[1:], [1, 1])
    for variable in merged.weights:
        variable.assign(variable * 0)
    assert [bits_of(model) for model in models] == before


def test_classifiers_keep_their_options_and_must_have_the_same_labels():
    first, second, other = (
        small(Qwen3NextClassifier, **DENSE, num_labels=n, pad_token_id=5) for n in (3, 3, 2)
    )
    merged = merge_linear([first, second], [1, 1])
    assert (merged.num_labels, merged.pad_token_id) == (3, 5)
    refused(lambda: merge_linear([first, other], [1, 1]), "models[1]", "score/kernel")
    language_model = small(**DENSE)
    refused(lambda: merge_linear([first, language_model], [1, 1]), "class", "Qwen3Next")


def test_what_thinks_and_predicts_ahead_is_merged_too():
    models = [small(**TWO_LAYERS, mtp=MTPConfig(num_predict_tokens=3)) for _ in range(2)]
    etd = {**ETD, "n_think_layers": 1, "use_layer_router": True, "use_lora_experts": True}
    models += [small(**TWO_LAYERS, etd=etd) for _ in range(2)]
    for first, second in (models[:2], models[2:]):
        second = with_noise(second, 4)
        expected = sum_of([weights_of(first), weights_of(second)], (0.25, 0.75))
        assert_weights(merge_linear([first, second], [1, 3]), expected)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"vocab_size": 62}, "vocab_size=62 instead of 61"),
        ({"rope_theta": 20000.0}, "rope_theta"),
        ({"ffn_type": "geglu"}, "ffn_type"),
        ({"attention_type": "group_query_attention"}, "attention_type"),
        ({"normalization_type": "rms_norm"}, "normalization_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"mtp": MTPConfig()}, "mtp.num_predict_tokens"),
        ({"etd": {**ETD, "n_encoder_layers": 0, "n_think_layers": 1}}, "etd.n_think_layers"),
    ],
)
def test_models_of_another_function_are_refused(fields, word):
    other = small(**{**DENSE, **fields})
    plain = small(**DENSE)
    before = bits_of(other)
    refused(lambda: merge_linear([plain, other], [1, 1]), "models[1]", word)
    refused(lambda: merge_task_arithmetic(other, [plain], [1]), "models[0]", "`base`")
    assert bits_of(other) == before


def test_fields_that_do_not_change_the_function_may_differ():
    etd = {**ETD, "use_lora_experts": True, "use_layer_router": True, "backprop_iterations": 1}
    fields = Qwen3NextConfig(**SMALL, etd=etd, mtp=MTPConfig()).to_dict()
    others = copy.deepcopy(fields)
    for name in FREE_FIELDS:
        *parents, leaf = name.split(".")
        place = functools.reduce(dict.__getitem__, parents, others)
        place[leaf] = FREE_VALUES.get(leaf, 1 if isinstance(place[leaf], int) else 0.25)
        assert place[leaf] != functools.reduce(dict.__getitem__, [*parents, leaf], fields)
    configs = [Qwen3NextConfig.from_dict(given) for given in (fields, others)]
    require_same_function(dict(zip("ab", configs)))


def test_models_with_adapters_are_refused():
    adapted = with_noise(base(), 1)
    adapted.lm_head.enable_lora(2)
    refused(lambda: merge_linear([base(), adapted], [1, 1]), "enable_lora", "lora_kernel")


def test_weights_that_are_not_finite_are_refused():
    broken = with_weights_of(base(), {"model/norm/weight": np.full(24, np.nan, "float32")})
    with pytest.raises(ValueError, match="model/norm/weight"):
        merge_linear([base(), broken], [1, 1])


@pytest.mark.parametrize(
    ("models", "weights", "options", "word"),
    [
        ([], [], {}, "models=[]"),
        (None, [1], {}, "models=None"),
        ([None], [1], {}, "models[0]"),
        (1, [1, 2], {}, "each of 1 models"),
        (1, 1, {}, "weights=1"),
        (1, ["1"], {}, "weights[0]='1'"),
        (1, [float("inf")], {}, "weights[0]=inf"),
        (1, [0.0], {"normalize": True}, "sum above 0"),
        (2, [1, -1], {"normalize": True}, "sum above 0"),
        (1, [1], {"normalize": 1}, "normalize=1"),
    ],
)
def test_wrong_arguments_are_refused(models, weights, options, word):
    given = [changed(1), changed(2)][:models] if isinstance(models, int) else models
    refused(lambda: merge_linear(given, weights, **options), word)
    refused(lambda: merge_task_arithmetic(base(), given, weights, **options), word)


def test_a_wrong_base_or_scale_is_refused():
    refused(lambda: merge_task_arithmetic(None, [base()], [1]), "`base`")
    refused(lambda: merge_task_arithmetic(base(), [base()], [1], scale="1"), "scale='1'")
