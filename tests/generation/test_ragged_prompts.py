"""Prompts that have ended are left out of the passes that read the others, and nothing changes."""

import numpy as np
import pytest
from keras import ops, tree

from qwen3_next import MTPConfig, Qwen3Next
from qwen3_next.generation import prompts as reading
from qwen3_next.generation.decoding import Request
from qwen3_next.generation.generator import Generator
from qwen3_next.generation.prompts import chunk_size, prefill_chunks, read_prompts
from qwen3_next.generation.sampling import make_sampling
from qwen3_next.generation.speculation_options import SpeculationOptions
from tests.support.routed_models import FIXED, routed
from tests.support.running import assert_close, to_numpy
from tests.support.small_models import TWO_LAYERS, random_ids, small

LENGTHS = (3, 41, 20, 9, 5)
PROMPTS = [random_ids(n, seed=n) for n in LENGTHS]
DECIDED = {
    "route": np.array([[2], [1], [0], [2], [1]], "int32"),
    "branch": np.array([0, 1, 2, 0, 1], "int32"),
}
# DeltaNet, and attention that may think, both without experts.
DENSE = {**TWO_LAYERS, "num_experts": 0, "mlp_only_layers": ()}
LAST_THINKS = {"n_encoder_layers": 1, "n_think_layers": 1, **FIXED}


def read(model, prompts, chunk, **decided):
    """The carry that decoding begins with."""
    vocab_size = model.config.vocab_size
    mode, sampling = make_sampling(vocab_size)
    speculative = model.config.mtp is not None
    options = SpeculationOptions(speculative, 2 if speculative else None, None, None)
    ((method, drafting),) = options.candidates(model, mode)
    request = Request(ops.convert_to_tensor(np.int32(4)), sampling, drafting)
    prompts = read_prompts(prompts, vocab_size)._replace(**decided)
    return Generator(model, chunk).prefill(prompts, 4, method, request)


def computed(prompts, size):
    """`(rows, width)` of every chunk."""
    return [tuple(chunk.mask.shape) for chunk in prefill_chunks(prompts, size, 256)]


def test_chunks_have_the_prompts_that_go_on():
    prompts = read_prompts(PROMPTS, 61)
    assert computed(prompts, 16) == [(5, 16), (2, 16), (1, 16)]
    found = [[] for _ in LENGTHS]
    for chunk in prefill_chunks(prompts, 16, 256):
        ids, mask = to_numpy(chunk.token_ids), to_numpy(chunk.mask)
        rows = range(5) if isinstance(chunk.rows, tuple) else to_numpy(chunk.rows)
        for row, *own in zip(rows, ids, mask, strict=True):
            found[row] += list(own[0][own[1]])
    for row, prompt in zip(found, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, prompt)


@pytest.mark.parametrize(
    "lengths, size",
    [
        ((1024,), 512),
        ((300,), 512),
        ((1024, 1024), 512),
        ((1024, 256, 256, 256), 256),
        ((1024, 512, 512, 512), 512),
        ((1024, 1000), 512),
        ((600, 500, 400, 300), 512),
    ],
)
def test_ragged_prompts_come_in_smaller_chunks_where_that_is_less(lengths, size):
    assert chunk_size(np.array(lengths), 512, 4096) == size


@pytest.mark.parametrize(
    "make, decided",
    [
        (
            lambda: small(**DENSE, mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2)),
            {},
        ),
        (lambda: routed(Qwen3Next, "both", **DENSE, etd=LAST_THINKS), DECIDED),
    ],
    ids=["modules", "loop"],
)
def test_leaving_rows_out_changes_nothing(make, decided, monkeypatch):
    model, prompts = make(), [prompt[:30] for prompt in PROMPTS]
    assert computed(read_prompts(prompts, 61), 16) == [(5, 16), (2, 16)]
    found = read(model, prompts, 16, **decided)
    monkeypatch.setattr(reading, "_unfinished", lambda lengths, start: np.arange(len(lengths)))
    whole = read(model, prompts, 16, **decided)
    assert tree.flatten(found)
    for one, other in zip(tree.flatten(found), tree.flatten(whole), strict=True):
        assert_close(to_numpy(one), to_numpy(other), 1e-5)
