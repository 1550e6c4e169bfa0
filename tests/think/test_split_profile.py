"""Angular distances of a model's layers, held against float64, and the split of a planted model."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import LayerProfile, Qwen3NextClassifier, pack, pad, profile_layers
from qwen3_next.think import split_profile
from qwen3_next.think.split_profile import angular_distances
from tests.support.float64_model import decoder_layer
from tests.support.published import weights
from tests.support.small_models import ONE_LAYER, random_ids, shared, small

DENSE = {**ONE_LAYER, "num_experts": 0}
ROWS = [random_ids(length, seed=length) for length in (9, 3, 12, 5, 7)]


@functools.cache
def exact_distances():
    arrays = {path: np.asarray(array, np.float64) for path, array in weights(shared()).items()}
    return np.mean([list(row_distances(arrays, row)) for row in ROWS], axis=0)


def row_distances(arrays, row):
    state = arrays["model/embed_tokens/embeddings"][row[None]]
    for index in range(shared().config.num_layers):
        place = f"model/layers_{index}/"
        own = {p.removeprefix(place): w for p, w in arrays.items() if p.startswith(place)}
        before, state = state, decoder_layer(own, shared().config, index, state)
        a, b = before[0, -1], state[0, -1]
        yield np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) / np.pi


def ragged():
    """Padding on the left of some rows and on the right of others."""
    left, right = pad(ROWS, 14, "left"), pad(ROWS, 14)
    here = np.arange(len(ROWS))[:, None] % 2 == 0
    return {key: np.where(here, left[key], right[key]) for key in left}


@pytest.mark.parametrize(("data", "batch_size"), [(ROWS, 2), (ragged(), 5)])
def test_distances_are_those_of_float64_however_padded_and_batched(data, batch_size):
    profile = profile_layers(shared(), data, batch_size=batch_size, verbose=0)
    assert profile.sequences == len(ROWS)
    exact = exact_distances()
    np.testing.assert_allclose(profile.distances, exact, atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(profile.distances, exact * 1.01, atol=1e-5, rtol=0)


def test_the_layers_of_a_planted_model_that_move_little_think():
    kinds = ("linear_attention", "full_attention")
    model = small(num_layers=8, layer_types=kinds * 4, num_experts=0, mlp_only_layers=())
    for layer in model.backbone.decoder_layers[2:6]:
        for weight in layer.weights:
            if weight.path.endswith(("out_proj/kernel", "o_proj/kernel", "down_proj/kernel")):
                weight.assign(0.01 * weight)
    profile = profile_layers(model, random_ids(6, 10), verbose=0)
    assert profile.raw_split == profile.split == (2, 4, 2)


def test_one_program_serves_all_batches_of_a_width(monkeypatch):
    widths, traced = [], split_profile._last_states

    def counted(backbone, token_ids, padding_mask):
        widths.append(tuple(token_ids.shape))
        return traced(backbone, token_ids, padding_mask)

    monkeypatch.setattr(split_profile, "_last_states", counted)
    lengths = (3, 16, 9, 17, 20, 5, 11)  # in pairs, with one left over
    model = small(**DENSE)
    profile_layers(model, [random_ids(n) for n in lengths], batch_size=2, verbose=0)
    assert sorted(set(widths)) == [(2, 16), (2, 24)]
    assert len(widths) == 2


def test_a_classifier_has_a_profile_and_shows_its_progress(capsys):
    classifier = small(Qwen3NextClassifier, num_labels=3, **DENSE)
    silent = profile_layers(classifier, ROWS, verbose=0)
    assert isinstance(silent, LayerProfile) and capsys.readouterr().out == ""
    shown = profile_layers(classifier, (row[None] for row in ROWS), verbose=1)
    assert "5/Unknown" in capsys.readouterr().out
    np.testing.assert_allclose(shown.distances, silent.distances, atol=1e-6)


def test_angles_of_equal_and_opposite_states_are_zero_and_one():
    state = np.full((1, 3), 0.1, "float32")
    states = np.stack([state, 7 * state, -state], axis=1)
    np.testing.assert_allclose(angular_distances(states), [[0.0, 1.0]], atol=1e-7)
    for wrong in (0.0, np.nan):
        with pytest.raises(ValueError, match="finite and not zero"):
            angular_distances(wrong * states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": keras.Sequential()}, "`model` must be a Qwen3Next"),
        ({"data": [[1, 61]]}, "vocab_size=61"),
        ({"data": [[1] * 257]}, "`max_position_embeddings`=256 tokens. Received: 257"),
        ({"data": iter([])}, "at least one sequence"),
        ({"data": pack(ROWS, 16)}, "`segment_ids`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"sensitivity": -1.0}, "`sensitivity`"),
        ({"verbose": 3}, "`verbose`"),
    ],
)
def test_what_cannot_be_profiled_is_refused(changes, message):
    arguments = {"model": shared(), "data": ROWS, "verbose": 0, **changes}
    with pytest.raises(ValueError, match=message):
        profile_layers(arguments.pop("model"), arguments.pop("data"), **arguments)
