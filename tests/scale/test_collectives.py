import numpy as np
import pytest

from qwen3_next.scale.collectives import Collective, collectives, largest_arrays
from tests.support.devices import distribution_of, eight_devices

TRIPS = '{"known_trip_count":{"n":"5"}}'
MESH = {"data": 2, "expert": 2, "tensor": 2}


def program(operation, groups, body=()):
    lines = [
        "%loop (p: f32[8]) -> f32[8] {",
        *body,
        "}",
        "",
        "ENTRY %main (p: f32[8]) -> f32[8] {",
        f"  %c = {operation}(%p), {groups}, metadata={{op_name="
        '"jit(step)/transpose(jvp(model))/layers_3/mlp/experts/shard_map/psum"}',
        f"  %w = f32[8] while(%p), condition=%c, body=%loop, backend_config={TRIPS}",
        "}",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "expert")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "expert")),
        (
            "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], "
            "device_ids=([2,4]T(1,0)) {'axis_1'}",
            ("expert", "tensor"),
        ),
        ("replica_groups={}", ("data", "expert", "tensor")),
    ],
)
def test_groups_of_devices_are_told_by_the_axes_along_which_they_differ(groups, axes):
    (row,) = collectives(program("f32[8]{0} all-reduce", groups), MESH)
    assert row.axes == axes


@pytest.mark.parametrize(
    ("operation", "received"),
    [
        ("f32[8,4]{1,0} all-gather", 64),  # half of 128 bytes is there
        ("bf16[8,4]{1,0} all-gather", 32),
        ("f32[8,4]{1,0} reduce-scatter", 128),  # of 256 bytes the other half of one's own half
        ("f32[8,4]{1,0} all-reduce", 128),
        ("(f32[4]{0}, f32[8]{0}) all-reduce-start", 48),
        ("f32[8,4]{1,0} collective-permute", 128),
    ],
)
def test_bytes_are_those_that_a_device_receives_at_least(operation, received):
    (row,) = collectives(program(operation, "replica_groups={{0,1},{2,3}}"), MESH)
    assert row.received == received


def test_what_a_loop_does_counts_as_often_as_it_runs():
    body = ["  %a = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}"]
    rows = collectives(program("f32[8]{0} all-gather", "replica_groups={{0,1}}", body), MESH)
    assert {row.kind: row.times for row in rows} == {"all-gather": 1, "all-reduce": 5}


def test_places_leave_out_numbers_of_layers():
    (row,) = collectives(program("f32[8]{0} all-reduce", "replica_groups={{0,1}}"), MESH)
    assert row.place == "model/layers/mlp/experts (backward)"


def test_groups_that_are_not_understood_are_refused():
    with pytest.raises(ValueError, match="Groups of devices"):
        collectives(program("f32[8]{0} all-reduce", "replica_groups=mesh['x'=8] {'x':(1)2}"), MESH)


def test_the_largest_arrays_come_first():
    sizes = largest_arrays("%a = f32[2,3] add(f32[8], pred[100])")
    assert list(sizes.items()) == [((100,), 100), ((8,), 32), ((2, 3), 24)]


@eight_devices
def test_a_compiled_sum_is_found():
    import jax

    with distribution_of("data=2,expert=2,tensor=2") as parallel:
        mesh = parallel.device_mesh.backend_mesh
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
        x = jax.device_put(np.ones((8, 4), "float32"), place)
        text = jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text()
    (row,) = collectives(text, parallel.sizes)
    assert row == Collective("all-reduce", ("tensor",), row.place, 1, 16.0, 16)
