"""Gated DeltaNets fitted to the attention that they replace."""

import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next.config import HybridAttentionConfig
from qwen3_next.layers.ops import attention
from qwen3_next.transfer.conversion.deltanet_calibration import attention_distance, replaced_layers
from qwen3_next.transfer.conversion.hybrid_transfer import create_hybrid_from_qwen3
from tests.support.small_models import random_ids
from tests.support.teachers import qwen3, weights_of

IDS = random_ids(4, 24, seed=1)
FIRST = {"layer_types": ("linear_attention", "full_attention")}


@pytest.fixture(scope="module")
def teacher():
    return qwen3(num_layers=2)


@functools.cache
def fitted_to_ids(teacher, **options):
    """One for all tests that leave it as it is."""
    return fitted(teacher, **options)


def fitted(teacher, calibration=IDS, **options):
    hybrid = HybridAttentionConfig(**{**FIRST, **options})
    return create_hybrid_from_qwen3(teacher, hybrid, calibration, progress=False)


def layer_error(teacher, student):
    """Relative squared error of the converted mixer, on the teacher's inputs."""
    (layer,) = replaced_layers(teacher, student, IDS)
    wanted, found = (
        ops.convert_to_numpy(mixer(layer.x)) for mixer in (layer.attention, layer.deltanet)
    )
    return np.mean((wanted - found) ** 2) / np.mean(wanted**2)


def test_distance_is_what_attention_to_positions_gives(teacher):
    mixer = teacher.backbone.decoder_layers[0].mixer
    x = np.random.default_rng(0).normal(size=(2, 9, 24)).astype("float32")
    query, key, value = mixer.heads(ops.convert_to_tensor(x))
    positions = ops.broadcast_to(ops.arange(9.0)[:, None, None], value.shape)
    attended = ops.convert_to_numpy(attention(query, key, positions))[..., 0]  # (B, T, H)
    expected = (np.arange(9.0)[:, None] - attended).mean(axis=(0, 1))
    np.testing.assert_allclose(attention_distance(mixer, x), expected, rtol=1e-5)


def test_distance_counts_real_tokens_alone(teacher):
    mixer = teacher.backbone.decoder_layers[0].mixer
    x = np.random.default_rng(0).normal(size=(2, 9, 24)).astype("float32")
    expected = attention_distance(mixer, x[:, 2:7])
    mask = ops.convert_to_tensor([[False] * 2 + [True] * 5 + [False] * 2] * 2)
    np.testing.assert_allclose(attention_distance(mixer, x, mask), expected, rtol=1e-5)


def test_every_head_halves_over_its_distance(teacher):
    student = fitted_to_ids(teacher)
    (layer,) = replaced_layers(teacher, student, IDS)
    decay = np.exp(-np.log1p(np.exp(ops.convert_to_numpy(layer.deltanet.dt_bias))))
    distance = attention_distance(layer.attention, layer.x)
    np.testing.assert_allclose(decay**distance, 0.5, rtol=1e-4)
    assert np.ptp(distance) > 0.1


def test_fits_come_nearer_to_the_teacher_than_no_layer_or_a_random_gate(teacher):
    random = fitted(teacher, output_gate_init="random")
    gate = fitted_to_ids(teacher)
    both = fitted_to_ids(teacher, output_projection_init="least_squares")
    assert layer_error(teacher, fitted(teacher, output_gate_init="zero")) == 1
    errors = [layer_error(teacher, model) for model in (both, gate, random)]
    assert errors[0] < errors[1] < 1 and errors[1] < errors[2]


def test_the_output_projection_is_the_least_squares_one(teacher):
    student = fitted(teacher, output_projection_init="least_squares")
    (layer,) = replaced_layers(teacher, student, IDS)
    kernel, error = layer.deltanet.out_proj.kernel, layer_error(teacher, student)
    values = ops.convert_to_numpy(kernel.value)
    for factor in (0.99, 1.01):
        kernel.assign(factor * values)
        assert layer_error(teacher, student) > error


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_fit(teacher, side):
    expected = weights_of(fitted_to_ids(teacher, output_projection_init="least_squares"))
    padding = np.zeros((4, 3), "int32")
    parts = (padding, IDS) if side == "left" else (IDS, padding)
    mask = [np.full(part.shape, part is IDS) for part in parts]
    given = {"token_ids": np.concatenate(parts, 1), "padding_mask": np.concatenate(mask, 1)}
    given = {name: np.pad(value, ((0, 1), (0, 0))) for name, value in given.items()}
    found = weights_of(fitted(teacher, given, output_projection_init="least_squares"))
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, atol=2e-3, rtol=2e-3, err_msg=path)


def test_the_teacher_stays_as_it_is(teacher):
    fitted_to_ids(teacher, output_projection_init="least_squares")
    before = weights_of(qwen3(num_layers=2))
    assert all(np.array_equal(value, before[path]) for path, value in weights_of(teacher).items())


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_shared_heads_are_fitted_too(heads):
    teacher = qwen3(num_layers=2)
    student = fitted(teacher, n_heads=heads[0], n_kv_heads=heads[1], conv_init="small_tap")
    assert layer_error(teacher, student) < 1


def test_the_report_says_what_was_fitted(teacher, capsys):
    student = fitted(teacher, output_projection_init="least_squares")
    text = str(student.coverage_report)
    assert "from attention distance" in text and "output projection" in text
    assert "share of the heads' outputs explained" in text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"token_ids": IDS, "segment_ids": np.ones_like(IDS)}, "`segment_ids` must be None"),
        ({"token_ids": IDS, "prompt_mask": np.ones_like(IDS)}, "`prompt_mask` must be None"),
        ({"token_ids": IDS, "padding_mask": np.zeros_like(IDS)}, "`calibration` .* real token"),
        (IDS[:0], "`calibration` .* real token"),
        (np.zeros((1, 65), "int32"), "`max_position_embeddings`=64 .*65"),
        (IDS + 61, "vocab_size=61"),
    ],
)
def test_what_nothing_can_be_fitted_to_is_refused(teacher, calibration, message):
    with pytest.raises(ValueError, match=message):
        fitted(teacher, calibration)
