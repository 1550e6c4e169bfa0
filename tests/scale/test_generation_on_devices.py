"""Generation on eight devices gives the tokens of one, from caches that are spread, too."""

import functools

import keras
import numpy as np
import pytest

from qwen3_next import MTPConfig, Qwen3Next, Qwen3NextConfig
from tests.support.devices import MESHES, WIDE, distribution_of, eight_devices

pytestmark = eight_devices
CONFIG = Qwen3NextConfig.from_variant(
    "tiny",
    num_layers=1,  # a DeltaNet; the module for more tokens brings attention with it
    full_attention_interval=2,
    initializer_range=0.2,  # so that the largest logit is the largest by far
    mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2),
    **{**WIDE, "mlp_only_layers": ()},
)
LENGTHS = (3, 9, 5, 7, 4, 4, 6, 8)
REQUESTS = {
    "sampled": {"temperature": 1.0, "top_k": 20, "seed": 3, "use_speculative": False},
    "speculative": {"temperature": 0.0, "use_speculative": True},
    "sampled speculatively": {"temperature": 0.8, "seed": 5, "use_speculative": True},
}


def prompts(rows):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in LENGTHS[:rows]]


def tokens(rows=8, requests=tuple(REQUESTS)):
    keras.utils.set_random_seed(0)
    model = Qwen3Next(CONFIG)
    found = {}
    for name in requests:
        rows_of_tokens, _ = model.generate(prompts(rows), 6, **REQUESTS[name])
        found[name] = [row.tolist() for row in rows_of_tokens]
    return found


on_one = functools.cache(tokens)


def test_every_way_to_generate_gives_the_tokens_of_one_device():
    with distribution_of(MESHES[-1]):
        assert tokens() == on_one()


# "data=2,expert=4" has three rows below.
@pytest.mark.parametrize("mesh", ["data=8", "expert=8", "tensor=4"])
def test_every_mesh_gives_the_tokens_of_one_device(mesh):
    with distribution_of(mesh):
        assert tokens(8, ("speculative",))["speculative"] == on_one()["speculative"]


def test_rows_that_do_not_divide_give_the_tokens_of_one_device():
    with distribution_of("data=2,expert=4"):
        assert tokens(3, ("speculative",)) == on_one(3, ("speculative",))


def test_caches_are_spread_by_row_and_head():
    with distribution_of("data=2,tensor=4"):
        cache = Qwen3Next(CONFIG.replace(num_layers=2)).init_cache(batch_size=4, max_length=16)
        deltanet, attention = cache.blocks
        held = CONFIG.linear_num_value_heads // 4
        dims = CONFIG.linear_key_head_dim, CONFIG.linear_value_head_dim
        assert shapes(deltanet.recurrent) == {(2, held, *dims)}
        # Two key heads on four devices: each has the one that its queries read.
        assert shapes(attention.keys) == {(2, 16, 1, CONFIG.head_dim)}


def shapes(array):
    return {tuple(shard.data.shape) for shard in array.addressable_shards}
