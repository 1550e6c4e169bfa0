"""An id that has no row, in a compiled program that cannot refuse it, gives NaN."""

import functools

import numpy as np
import pytest
from keras import ops

from qwen3_next.models.compiled import compile_with_weights
from tests.support.running import BACKEND
from tests.support.small_models import TWO_LAYERS, random_ids, small

IDS = random_ids(2, 12)
WIDE = [-(2**32) + 3, 2**32 + 3] if BACKEND == "tensorflow" else []  # JAX holds no such integers


@functools.cache
def model():
    return small(**TWO_LAYERS)


@functools.cache
def compiled():
    def logits_and_loss(ids, labels):
        output = model()(ids, labels=labels)
        return output.logits, output.loss

    return compile_with_weights(model(), logits_and_loss)


def logits_and_loss(ids, labels):
    dtype = "int64" if WIDE else "int32"
    arrays = (ops.convert_to_tensor(x.astype(dtype)) for x in (ids, labels))
    return tuple(ops.convert_to_numpy(x) for x in compiled()(*arrays))


@pytest.mark.parametrize("wrong", [61, -1, -100, 2**31 - 1, *WIDE])
def test_a_wrong_id_gives_nan_from_there_on_and_in_no_other_row(wrong):
    expected, _ = logits_and_loss(IDS, IDS)
    ids = np.where(np.arange(12) == 7, [[wrong], [0]], IDS)
    ids[1] = IDS[1]
    logits, loss = logits_and_loss(ids, IDS)
    assert np.isnan(logits[0, 7:]).all()
    np.testing.assert_allclose(logits[1], expected[1], atol=1e-5)
    assert np.isnan(loss)


@pytest.mark.parametrize("wrong", [61, -1, *WIDE])
def test_a_wrong_label_gives_no_finite_loss(wrong):
    labels = np.where(np.arange(12) == 7, wrong, IDS.astype("int64"))
    logits, loss = logits_and_loss(IDS, labels)
    assert np.isfinite(logits).all()
    assert np.isnan(loss)
