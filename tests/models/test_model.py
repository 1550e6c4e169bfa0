"""What a model promises whatever its weights: padding, packing, causality, cache."""

import keras
import numpy as np
import pytest

from qwen3_next import Qwen3Next, Qwen3NextBackbone
from tests.support.running import assert_close, run
from tests.support.small_models import ONE_LAYER, logits, random_ids, shared, small

LENGTH = 72
IDS = random_ids(3, LENGTH)
LENGTHS = (LENGTH, 41, 7)
TOLERANCE = 5e-5  # of logits around 2; a third of it is rounding in another order


def masks():
    """Left, right, both sides and everywhere: each row keeps `LENGTHS` real tokens."""
    rng = np.random.default_rng(1)
    right = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    scattered = np.stack([rng.permutation(row) for row in right])
    both = np.stack([np.roll(row, 11) if n < 60 else row for row, n in zip(right, LENGTHS)])
    return {"left": right[:, ::-1], "right": right, "both": both, "scattered": scattered}


def placed(mask):
    """The first `LENGTHS` ids of every row at the real places, junk at the others."""
    ids = random_ids(*mask.shape, seed=9)
    for row, real, source in zip(ids, mask, IDS):
        row[real] = source[: real.sum()]
    return ids


@pytest.fixture(scope="module")
def unpadded():
    whole = logits(shared(), IDS)
    return [row[:n] for row, n in zip(whole, LENGTHS)]  # causal: a prefix is a shorter row


@pytest.mark.parametrize("kind", masks())
def test_padding_does_not_change_real_tokens(kind, unpadded):
    mask = masks()[kind]
    padded = logits(shared(), placed(mask), mask)
    for row, real, expected in zip(padded, mask, unpadded):
        np.testing.assert_allclose(row[real], expected, atol=TOLERANCE)


def test_packed_is_separate():
    cuts = [(0, 5), (5, 6), (6, 50), (50, LENGTH)]  # begin inside a chunk, and one token alone
    segments = np.concatenate([[i] * (b - a) for i, (a, b) in enumerate(cuts)])
    packed = logits(shared(), IDS, np.ones(IDS.shape), np.tile(segments, (3, 1)))
    for start, end in cuts:
        document = np.roll(IDS, -start, axis=1)
        alone = logits(shared(), document)[:, : end - start]
        np.testing.assert_allclose(packed[:, start:end], alone, atol=TOLERANCE)


def test_packed_rows_may_be_padded():
    mask = masks()["left"]
    segments = np.where(np.arange(LENGTH) < LENGTH - 4, 3, 1)
    padded = logits(shared(), placed(mask), mask, np.tile(segments, (3, 1)))
    tail = np.tile(IDS[:1], (3, 1))
    for row, n in enumerate(LENGTHS):
        tail[row, :4] = IDS[row, n - 4 : n]
    np.testing.assert_allclose(padded[:, -4:], logits(shared(), tail)[:, :4], atol=TOLERANCE)


def test_the_future_does_not_leak():
    changed = IDS.copy()
    changed[:, 40:] = random_ids(3, LENGTH - 40, seed=5)
    before, after = logits(shared(), IDS), logits(shared(), changed)
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert np.abs(before[:, 40:] - after[:, 40:]).max() > 0.1


def test_rows_do_not_see_each_other():
    changed = IDS.copy()
    changed[0] = random_ids(LENGTH, seed=6)
    np.testing.assert_allclose(
        logits(shared(), IDS)[1:], logits(shared(), changed)[1:], atol=TOLERANCE
    )


def extend_in_chunks(mask, ids, cuts):
    model = shared()
    cache = model.init_cache(3, 96)
    outputs = []
    for start, end in cuts:
        inputs = {"token_ids": ids[:, start:end], "padding_mask": mask[:, start:end]}
        output, cache = model.extend(inputs, cache)
        outputs.append(keras.ops.convert_to_numpy(output))
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
def test_cached_is_uncached_in_one_chunk_and_in_several(kind, unpadded):
    mask = masks()[kind]
    whole, cache = extend_in_chunks(mask, placed(mask), [(0, LENGTH)])
    chunks, other = extend_in_chunks(
        mask, placed(mask), [(0, 24), (24, 48), *((t, t + 1) for t in range(48, LENGTH))]
    )
    for got in (whole, chunks):
        for row, real, expected in zip(got, mask, unpadded):
            np.testing.assert_allclose(row[real], expected, atol=TOLERANCE)
    assert_same_cache(cache, other, LENGTHS)


def assert_same_cache(a, b, lengths, tolerance=1e-5):
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(a.lengths), lengths)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(b.lengths), lengths)
    for one, other in zip(keras.tree.flatten(a.layers), keras.tree.flatten(b.layers)):
        one, other = (keras.ops.convert_to_numpy(x) for x in (one, other))
        assert_close(one, other, tolerance)


def test_a_row_without_new_tokens_keeps_its_cache():
    model = shared()
    mask = np.ones((3, 24), bool)
    _, cache = model.extend(
        {"token_ids": IDS[:, :24], "padding_mask": mask}, model.init_cache(3, 96)
    )
    mask[:, 1:] = False
    mask[1] = False
    _, after = model.extend({"token_ids": IDS[:, :24], "padding_mask": mask}, cache)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(after.lengths), [25, 24, 25])
    for old, new in zip(keras.tree.flatten(cache.layers), keras.tree.flatten(after.layers)):
        old, new = keras.ops.convert_to_numpy(old), keras.ops.convert_to_numpy(new)
        np.testing.assert_array_equal(old[1], new[1])
        assert np.abs(old[0] - new[0]).max() > 0


def test_every_kind_of_layer_owns_only_its_kind_of_cache():
    cache = shared().init_cache(2, 64)
    kinds = [type(cache).__name__ for passes in cache.layers for cache in passes]
    assert kinds == ["DeltaNetCache", "AttentionCache", "DeltaNetCache"]


def test_compiled_code_sees_new_weights():
    model = small(**ONE_LAYER)
    before = logits(model, IDS[:1, :16])
    model.backbone.norm.weight.assign(model.backbone.norm.weight + 1.0)
    assert np.abs(logits(model, IDS[:1, :16]) - before).max() > 0.1


@pytest.mark.parametrize(
    "inputs, message",
    [
        (np.zeros((4,), "int32"), "token_ids"),
        (np.zeros((2, 3, 4), "int32"), "token_ids"),
        (np.zeros((2, 0), "int32"), "0 tokens"),
        (np.zeros((2, 3), "float32"), "integers"),
        (np.full((2, 3), 61), "vocab_size=61"),
        (np.full((2, 3), -1), "vocab_size=61"),
        ({"token_ids": np.zeros((2, 3), int), "padding_mask": np.ones((2, 4))}, "padding_mask"),
        ({"token_ids": np.zeros((2, 3), int), "segment_ids": np.ones((2,), int)}, "segment_ids"),
        ({"token_ids": IDS[:2, :2], "segment_ids": np.full((2, 2), 1.2)}, "segment_ids.*integers"),
        ({"token_ids": IDS[:2, :2], "segment_ids": np.ones((2, 2), bool)}, "segment_ids.*integers"),
        ({"token_ids": IDS[:2, :2], "segment_ids": np.full((2, 2), 2**32 + 1)}, "segment.*int32"),
        ({"token_ids": IDS[:2, :2], "padding_mask": np.full((2, 2), np.nan)}, "padding_mask.*NaN"),
        ({"token_ids": np.zeros((2, 3), int), "mask": np.ones((2, 3))}, "mask"),
        ({"padding_mask": np.ones((2, 3))}, "token_ids"),
        (np.zeros((1, 257), int), "max_position_embeddings"),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        shared()(inputs)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"segment_ids": np.full((2, 8), 2**32 + 1)}, "`segment_ids` must fit in int32.*Received"),
        ({"segment_ids": np.ones((2, 8))}, "`segment_ids` must be integers.*Received"),
        ({"padding_mask": np.full((2, 8), np.nan)}, "`padding_mask` must not hold NaN.*Received"),
    ],
)
def test_what_training_would_cast_is_refused(changed, message):
    model = small(**ONE_LAYER)
    model.compile("adamw")
    with pytest.raises(ValueError, match=message):
        model.fit({"token_ids": IDS[:2, :8], **changed}, verbose=0)


def test_a_full_cache_says_so():
    model = shared()
    with pytest.raises(ValueError, match="room for 16"):
        model.extend(IDS[:, :24], model.init_cache(3, 16))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model.init_cache(3, 257)


def test_packed_rows_take_no_cache():
    model = shared()
    inputs = {"token_ids": IDS[:, :8], "segment_ids": IDS[:, :8]}
    with pytest.raises(ValueError, match="segment_ids"):
        model.backbone(inputs, cache=model.init_cache(3, 16))


def test_without_experts_and_gates_the_model_is_a_dense_transformer():
    model = small(
        layer_types=("full_attention",) * 3,
        num_experts=0,
        mlp_only_layers=(),
        attention_type="group_query_attention",
        normalization_type="rms_norm",
    )
    paths = " ".join(v.path for v in model.variables)
    assert "linear_attn" not in paths and "experts" not in paths
    assert model.backbone.decoder_layers[0].mixer.q_proj.kernel.shape == (24, 4, 8)


def test_the_backbone_returns_hidden_states():
    backbone = small(Qwen3NextBackbone, **ONE_LAYER)

    def call(ids):
        return backbone(ids), backbone(ids, full_output=True)

    plain, full = run(call, IDS[:1, :16])
    assert plain.shape == (1, 16, 24)
    np.testing.assert_array_equal(plain, full.hidden)
    assert full.expert_load.shape == (1, 5)


def test_a_model_works_inside_a_functional_model():
    inputs = keras.Input((16,), dtype="int32")
    made = small(**ONE_LAYER)
    model = keras.Model(inputs, made(inputs))
    found = model.predict(IDS[:1, :16], verbose=0)
    np.testing.assert_allclose(found, logits(made, IDS[:1, :16]), atol=TOLERANCE)


def test_a_symbolic_call_with_labels_is_refused():
    inputs = keras.Input((16,), dtype="int32")
    with pytest.raises(ValueError, match="labels"):
        shared()(inputs, labels=inputs)


def test_mixed_bfloat16_keeps_float32_where_it_counts():
    model = small(Qwen3Next, dtype="mixed_bfloat16")
    assert model.compute_dtype == "bfloat16"
    assert logits(model, IDS).dtype.name == "bfloat16"
    exact = logits(shared(), IDS)
    close = logits(model, IDS).astype("float32")
    assert np.abs(close - exact).mean() < 0.05 * np.abs(exact).mean()
    cache = model.init_cache(3, 96)
    assert keras.backend.standardize_dtype(cache.layers[0][0].recurrent.dtype) == "float32"
    assert keras.backend.standardize_dtype(cache.layers[1][0].keys.dtype) == "bfloat16"
