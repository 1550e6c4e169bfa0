"""Every kind of data gives the same sequences, without padding."""

import keras
import numpy as np
import pytest

from qwen3_next import pack, pad
from qwen3_next.think.token_sequences import token_sequences
from tests.support.small_models import random_ids

ROWS = [random_ids(length, seed=length) for length in (9, 3, 12, 5)]
PADDED = pad(ROWS, side="left")
LABELS = np.zeros((4, 12), "int32")


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    @property
    def num_batches(self):
        return None if self.batches is None else len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def halves(data):
    return [{key: value[rows] for key, value in data.items()} for rows in (slice(2), slice(2, 4))]


def dataset(with_labels):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((PADDED, LABELS) if with_labels else PADDED).batch(3)


KINDS = {
    "list": lambda: ROWS,
    "lists": lambda: [row.tolist() for row in ROWS],
    "left": lambda: PADDED,
    "right": lambda: pad(ROWS, 15),
    "tensors": lambda: {k: keras.ops.convert_to_tensor(v) for k, v in PADDED.items()},
    "with labels": lambda: (PADDED, LABELS),
    "generator": lambda: (batch for batch in halves(PADDED)),
    "generator of lists": lambda: (rows for rows in (ROWS[:3], ROWS[3:])),
    "PyDataset": lambda: Batches([(batch, None) for batch in halves(PADDED)]),
    "tf.data": lambda: dataset(False),
    "tf.data with labels": lambda: dataset(True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_sequences(kind):
    found = [row.tolist() for row in token_sequences(KINDS[kind]())]
    assert found == [row.tolist() for row in ROWS]


def test_an_array_without_a_mask_is_all_tokens():
    ids = random_ids(3, 7)
    np.testing.assert_array_equal(np.stack(token_sequences(ids)), ids)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pack(ROWS, 16), "`segment_ids` must be None"),
        (iter([pack(ROWS, 16)]), "`segment_ids` must be None"),
        ({"ids": ROWS}, "'token_ids'"),
        (np.zeros(4, "int32"), r"token_ids.shape=\(4,\)"),
        ({"token_ids": LABELS, "padding_mask": LABELS[:2]}, r"padding_mask.shape=\(2, 12\)"),
        ({"token_ids": LABELS, "padding_mask": LABELS}, "non-empty"),
        (np.zeros((2, 3), "float32"), "integer token ids"),
        (iter([[[0.5]]]), "integer token ids"),
        (Batches(None), "without a length"),
        ([], "at least one row"),
        ((), r"token_ids.shape=\(0,\)"),
        ({1: 2, "a": 3}, "'token_ids'"),
        ({"token_ids": [[1], [2, 3]]}, "`token_ids` must be an array"),
        ({"token_ids": [[1, 2]], "padding_mask": [["a", ""]]}, "`padding_mask` must be an array"),
        ("text", "`data` must be"),
        (7, "`data` must be"),
    ],
)
def test_other_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(token_sequences(data))
