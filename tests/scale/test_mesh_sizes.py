"""Meshes as text."""

import keras
import pytest

from qwen3_next.scale.mesh_sizes import mesh_text, sizes_of
from tests.support.devices import eight_devices


@pytest.mark.parametrize("text", ["data=2,expert=4", " expert = 4 , data=02 "])
def test_axes_come_in_one_order_and_are_one_without_a_size(text):
    assert list(sizes_of(text).items()) == [("data", 2), ("expert", 4), ("tensor", 1)]
    assert mesh_text(sizes_of(text)) == "data=2,expert=4"


@eight_devices
def test_a_mesh_of_devices_has_sizes():
    mesh = keras.distribution.DeviceMesh((4, 2), ("expert", "tensor"))
    assert sizes_of(mesh) == {"data": 1, "expert": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("", "must be text such as"),
        ("data", "must be text such as"),
        ("data=2;expert=4", "must be text such as"),
        ("data=2,", "must be text such as"),
        (8, "must be text such as"),
        (None, "must be text such as"),
        ("data=0", "positive integers"),
        ("data=-2", "positive integers"),
        ("data=2.5", "positive integers"),
        ("data=two", "positive integers"),
        ("data=99999999999999999999", "positive integers"),
        ("model=8", "unknown axes"),
        ("data=2,data=4", "every axis once"),
    ],
)
def test_what_is_no_mesh_is_refused_with_its_text(mesh, words):
    with pytest.raises(ValueError, match=words) as error:
        sizes_of(mesh)
    assert repr(mesh) in str(error.value)
