"""From sequences to arrays: padded, packed, and continued by the model itself."""

import numpy as np
import pytest

from qwen3_next import pack, pad, self_distillation_data
from tests.support.mtp_models import ROWS, two_steps


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_token_on_its_side(side):
    batch = pad(ROWS, length=20, side=side)
    for row, ids, mask in zip(ROWS, batch["token_ids"], batch["padding_mask"]):
        np.testing.assert_array_equal(ids[mask], row)
        assert mask[:: 1 if side == "right" else -1][: len(row)].all()


def test_packing_keeps_every_sequence_whole():
    sequences = [np.full(n, n, "int32") for n in (7, 3, 9, 2, 5)]
    batch = pack(sequences, length=10)
    found = []
    for ids, segments, mask in zip(batch["token_ids"], batch["segment_ids"], batch["padding_mask"]):
        np.testing.assert_array_equal(mask, segments > 0)
        found += [ids[segments == n].tolist() for n in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(row.tolist() for row in sequences)
    assert len(batch["token_ids"]) == 3  # 9, 7 + 3, 5 + 2


@pytest.mark.parametrize("make", [pad, pack])
@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "at least one"),
        ([[]], "non-empty"),
        ([[0.5]], "integer"),
        ([[1] * 9], "`length`=8"),
        ([[3], [2**40 + 7, 3]], "sequence 1 with ids from 3 to 1099511627783"),
        ([[1, -1]], "sequence 0 with ids from -1 to 1"),
    ],
)
def test_sequences_that_cannot_be_rows_are_named(make, sequences, message):
    with pytest.raises(ValueError, match=message):
        make(sequences, length=8)


def test_self_distillation_continues_every_prompt():
    model = two_steps()
    data = self_distillation_data(model, ROWS, 5, batch_size=2, progress=False)
    tokens, _ = model.generate(ROWS, 5)
    for prompt, new, row, mask in zip(ROWS, tokens, data["token_ids"], data["padding_mask"]):
        np.testing.assert_array_equal(row[mask], np.concatenate([prompt, new]))


def test_self_distillation_decodes_plainly():
    with pytest.raises(ValueError, match=r"`use_speculative`.*Received: use_speculative=True"):
        self_distillation_data(two_steps(), ROWS, 5, progress=False, use_speculative=True)
