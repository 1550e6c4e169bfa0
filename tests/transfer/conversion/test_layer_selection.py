"""Which layers keep their attention, by what it takes off the divergence."""

import json

import numpy as np
import pytest

from qwen3_next import HybridAttentionConfig, create_hybrid_from_qwen3
from qwen3_next.transfer.conversion.layer_selection import LayerSelection, select_attention_layers
from qwen3_next.transfer.named_weights import NamedWeights, rebuilt
from tests.support.small_models import logits_once, random_ids
from tests.support.teachers import qwen3

IDS = random_ids(4, 12)
EVERYWHERE = HybridAttentionConfig((0,), pattern_period=1, allow_no_attention=True)
PADDING = {"token_ids": IDS, "padding_mask": np.zeros_like(IDS)}
SELECTION = LayerSelection(baseline=2.0, divergences=(1.9, 1.2, 1.8, 1.5), keep=2)


@pytest.fixture(scope="module")
def pair():
    teacher = qwen3(num_layers=2)
    return teacher, create_hybrid_from_qwen3(teacher, EVERYWHERE, progress=False)


@pytest.fixture(scope="module")
def selected(pair, tmp_path_factory):
    """A selection in two batches, and the file that it left."""
    path = tmp_path_factory.mktemp("selection") / "selection.json"
    found = select_attention_layers(*pair, IDS, 1, batch_size=3, path=path, progress=False)
    return found, path.read_text()


def divergence(teacher, student):
    """Mean KL per token in float64, from logits."""
    expected, found = (logits_once(model, IDS).astype("float64") for model in (teacher, student))
    logs = [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (expected, found)]
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()


def test_divergences_are_those_of_hybrids_that_keep_one_layer(pair, selected):
    (teacher, student), (selection, _) = pair, selected
    assert selection.baseline == pytest.approx(divergence(teacher, student), rel=1e-4)
    kinds = ("linear_attention", "full_attention")
    hybrid = create_hybrid_from_qwen3(
        teacher, HybridAttentionConfig(layer_types=kinds), progress=False
    )
    fitted, kept = NamedWeights(student), NamedWeights(hybrid)
    one = rebuilt(hybrid, hybrid.config, lambda row: fitted.get(row.path, kept.get(row.path)))
    assert selection.divergences[1] == pytest.approx(divergence(teacher, one), rel=1e-4)
    assert selection.kept == (int(np.argmin(selection.divergences)),)


def test_padding_changes_no_divergence(pair, selected):
    padded = {"token_ids": np.pad(IDS, ((0, 0), (3, 0)))}
    padded["padding_mask"] = np.arange(15) >= np.full((4, 1), 3)
    found = select_attention_layers(*pair, padded, 1, progress=False)
    np.testing.assert_allclose(found.divergences, selected[0].divergences, rtol=1e-4)


def test_a_run_that_was_stopped_goes_on(pair, selected, tmp_path):
    path = tmp_path / "selection.json"
    whole, text = selected
    saved = json.loads(text)
    saved["divergences"] = {"-1": whole.baseline, "0": 7.0}  # as if it had found that
    path.write_text(json.dumps(saved))
    again = select_attention_layers(*pair, IDS, 1, path=path, progress=False)
    assert again.divergences[0] == 7.0
    assert again.divergences[1:] == pytest.approx(whole.divergences[1:], rel=1e-5)
    for other in (IDS + 1, IDS.reshape(2 * len(IDS), -1)):
        with pytest.raises(ValueError, match="`path` must be a file of the same models and tokens"):
            select_attention_layers(*pair, other, 1, path=path, progress=False)
    path.write_text(json.dumps({**saved, "checksum": None, "fingerprint": saved["checksum"]}))
    with pytest.raises(ValueError, match="`path` must be a file of the same models and tokens"):
        select_attention_layers(*pair, IDS, 1, path=path, progress=False)  # an earlier file
    for key, value in (("99", 1.0), ("0", None), ("0", "x"), ("0", [1])):
        path.write_text(json.dumps({**saved, "divergences": {key: value}}))
        with pytest.raises(ValueError, match="`path` must be a file of the same models and tokens"):
            select_attention_layers(*pair, IDS, 1, path=path, progress=False)


def test_a_file_of_another_configuration_of_the_same_weights_is_refused(pair, selected, tmp_path):
    path = tmp_path / "selection.json"
    path.write_text(selected[1])
    teacher, student = pair
    other = qwen3(num_layers=2, rope_theta=500.0)
    other.set_weights(teacher.get_weights())
    with pytest.raises(ValueError, match="`path` must be a file of the same models and tokens"):
        select_attention_layers(other, student, IDS, 1, path=path, progress=False)


def test_the_largest_falls_are_kept():
    assert SELECTION.ranking == (1, 3, 2, 0) and SELECTION.kept == (1, 3)
    np.testing.assert_allclose(SELECTION.falls, (0.1, 0.8, 0.2, 0.5))
    kept = SELECTION.hybrid_attention(half_life=8.0)
    assert [kept.should_use_deltanet(i) for i in range(4)] == [True, False, True, False]
    assert kept.half_life == 8 and "1      0.8000  kept" in str(SELECTION)


def test_falls_are_drawn(tmp_path):
    ax = SELECTION.plot(tmp_path / "falls.png")
    assert len(ax.patches) == 4 and (tmp_path / "falls.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, s: select_attention_layers(t, t, IDS, 1), "`student` in none"),
        (lambda t, s: select_attention_layers(s, s, IDS, 1), "`teacher` must have attention"),
        (lambda t, s: select_attention_layers(t, 3, IDS, 1), "`student` must be a Qwen3Next"),
        (lambda t, s: select_attention_layers(t, s, IDS, 3), "`keep` must be an integer, 1 to 1"),
        (lambda t, s: select_attention_layers(t, s, IDS, 1, batch_size=0), "`batch_size` must"),
        (lambda t, s: select_attention_layers(t, s, [[99]], 1), "Token ids must be"),
        (lambda t, s: select_attention_layers(t, s, IDS[:0], 1), "`token_ids` .* real token"),
        (lambda t, s: select_attention_layers(t, s, PADDING, 1), "`token_ids` .* real token"),
        (lambda t, s: select_attention_layers(t, s, "a", 1), "must be an array.*Received"),
        (lambda t, s: select_attention_layers(t, s, IDS, 1, path=5), "`path` must be a path"),
        (lambda t, s: select_attention_layers(t, s, IDS, 1, path=""), "`path` must be a path"),
        (lambda t, s: select_attention_layers(t, s, IDS, 1, path="no/a.json"), "`path` must be"),
        (lambda t, s: LayerSelection(np.nan, (1.0, 2.0), 1), "`baseline` must be a finite"),
        (lambda t, s: LayerSelection("a", (1.0, 2.0), 1), "`baseline` must be a finite"),
        (lambda t, s: LayerSelection(1.0, (1.0, "a"), 1), "`divergences` must be .* finite"),
        (lambda t, s: LayerSelection(1.0, 5, 1), "`divergences` must be .* finite"),
        (lambda t, s: LayerSelection(1.0, (), 1), "`divergences` must be .* finite"),
    ],
)
def test_what_cannot_be_compared_is_named(pair, call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair)
