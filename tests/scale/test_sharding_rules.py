"""Which axes of a mesh split which dims, by the rules alone."""

import pytest

from qwen3_next import Qwen3NextConfig
from qwen3_next.models.weight_rows import AXES
from qwen3_next.models.weight_table import weight_table
from qwen3_next.scale.mesh_sizes import sizes_of
from qwen3_next.scale.sharding_rules import CANDIDATES, sharding_of

ROWS = {row.path: row for row in weight_table(Qwen3NextConfig.from_variant("80b_a3b"))}
GATE_UP, ROUTER = "model/layers_0/mlp/experts/gate_up", "model/layers_0/mlp/gate/kernel"
HEAD, KEYS = "lm_head/kernel", "model/layers_3/self_attn/k_proj/kernel"
NORM, OUT = "model/norm/weight", "model/layers_0/linear_attn/out_proj/kernel"


@pytest.mark.parametrize(
    ("path", "mesh", "fsdp", "axes"),
    [
        (GATE_UP, "expert=8", False, ("expert", None, None)),
        (GATE_UP, "tensor=8", False, ("tensor", None, None)),
        (GATE_UP, "expert=8,tensor=8", False, (("expert", "tensor"), None, None)),
        (GATE_UP, "data=8", False, (None, None, None)),
        (GATE_UP, "data=8,expert=2", True, ("expert", "data", None)),
        (HEAD, "tensor=8", False, (None, "tensor")),
        (HEAD, "data=2,expert=2,tensor=2", True, (("data", "expert"), "tensor")),
        (HEAD, "data=3,expert=4", True, ("expert", None)),
        (OUT, "tensor=4", False, ("tensor", None, None)),
        (KEYS, "tensor=2", False, (None, "tensor", None)),
        (KEYS, "tensor=4", False, (None, None, None)),
        (ROUTER, "data=2,expert=2,tensor=2", True, (None, None)),
        (NORM, "data=2", True, (None,)),
    ],
)
def test_a_weight_is_split_by_the_first_axes_that_divide_it(path, mesh, fsdp, axes):
    assert sharding_of(ROWS[path], sizes_of(mesh), fsdp).axes == axes


@pytest.mark.parametrize(
    ("path", "mesh", "fsdp", "words"),
    [
        (KEYS, "tensor=4", False, "2 key/value heads do not divide over tensor=4"),
        (GATE_UP, "expert=2,tensor=3", False, "512 experts do not divide over expert=2 x tensor=3"),
        (GATE_UP, "data=2,expert=8", False, "copies along data"),
        (GATE_UP, "data=2,expert=8", True, ""),
        (OUT, "data=2,expert=2,tensor=2", False, "copies along data and expert"),
        (GATE_UP, "data=2", False, "the mesh has no expert or tensor"),
        (NORM, "tensor=2", False, "no dim of it is split"),
        (NORM, "data=2", True, "a vector"),
        (ROUTER, "data=2", True, "a router is read whole"),
        (HEAD, "data=1", False, ""),
    ],
)
def test_a_reason_says_why_a_device_holds_more_than_its_share(path, mesh, fsdp, words):
    assert sharding_of(ROWS[path], sizes_of(mesh), fsdp).reason == words


@pytest.mark.parametrize(
    ("path", "mesh", "words"),
    [
        (HEAD, "tensor=7", "`vocab` of 151936 is not a multiple of the mesh's tensor=7"),
        (OUT, "tensor=64", "`linear_value_heads` of 32 is not a multiple of the mesh's tensor=64"),
        (GATE_UP, "expert=1024", "`experts` of 512 is not a multiple of the mesh's expert=1024"),
    ],
)
def test_what_an_axis_should_split_and_does_not_divide_is_an_error(path, mesh, words):
    with pytest.raises(ValueError, match=words) as error:
        sharding_of(ROWS[path], sizes_of(mesh))
    assert path in str(error.value)


def test_every_rule_is_for_an_axis_of_the_weight_table():
    assert set(CANDIDATES) <= set(AXES)
