"""What `describe_layout` says, against what sharded models hold."""

import pytest

from qwen3_next import MTPConfig, Qwen3NextClassifier, describe, describe_layout
from tests.support.devices import MESHES, WIDE, distribution_of, eight_devices, held_bytes
from tests.support.small_models import SMALL, small


@eight_devices
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_it_says_what_the_devices_hold(mesh, fsdp):
    with distribution_of(mesh, fsdp=fsdp) as parallel:
        model = small(**WIDE, mtp=MTPConfig(num_predict_tokens=2, speculation_lookahead=2))
        model.compile("adamw")
        model.optimizer.build(model.trainable_variables)
        said = describe_layout(model.config, mesh, fsdp=fsdp, dtype="float32", optimizer="adamw")
        assert set(held_bytes(model.weights).values()) == {said.weight_bytes_per_device}
        states = [v for v in model.optimizer.variables if len(v.shape) > 0]
        assert set(held_bytes(states).values()) == {said.optimizer_bytes_per_device}
        of_model = describe_layout(model, parallel.device_mesh, fsdp=fsdp, optimizer="adamw")
        assert {*of_model.rows} == {*said.rows}


@eight_devices
def test_a_model_is_described_with_its_dtype_its_counters_and_what_it_trains():
    with distribution_of("expert=8"):
        mtp = MTPConfig(num_predict_tokens=2, speculation_lookahead=2, warmup_steps=2)
        model = small(**WIDE, mtp=mtp, freeze_backbone=True, dtype="bfloat16")
        said = describe_layout(model, "expert=8", optimizer="adamw")
        assert set(held_bytes(model.weights).values()) == {said.weight_bytes_per_device}
        trained = held_bytes(model.trainable_variables)
        assert {2 * held for held in trained.values()} == {said.optimizer_bytes_per_device}
        assert said.by_part()["other"] == 4


def test_the_published_model_is_described_for_64_devices():
    said = describe_layout("80b_a3b", "expert=8,tensor=8", optimizer="adamw")
    text = str(said)
    assert said.devices == 64 and said.weight_bytes == describe("80b_a3b").weight_bytes["bfloat16"]
    assert said.optimizer_bytes == 2 * said.weight_bytes
    assert 1 < 3 * said.weight_bytes_per_device / said.least_bytes_per_device < 1.4
    assert "model/layers_{0..47}/mlp/experts/gate_up " in text
    assert "model/layers_{3,7..47}/self_attn/k_proj/kernel" in text
    assert "2 key/value heads do not divide over tensor=8" in text
    assert len(text.splitlines()) < 40


def test_a_classifier_and_fsdp_are_described():
    plain, split = (
        describe_layout("small", "data=8", fsdp=fsdp, num_labels=3) for fsdp in (False, True)
    )
    assert plain.rows[-1].path == "score/kernel" and plain.rows[-1].bytes == 1024 * 3 * 4
    assert split.weight_bytes_per_device < 0.13 * plain.weight_bytes_per_device
    assert plain.weight_bytes_per_device == plain.weight_bytes == split.weight_bytes
    model = small(Qwen3NextClassifier, num_labels=3)
    assert describe_layout(model, "data=2").rows[-1].shape == (SMALL["hidden_size"], 3)


def test_weights_are_drawn_by_device_and_part(tmp_path):
    pytest.importorskip("matplotlib")
    said = describe_layout("tiny", "expert=4,tensor=2")
    ax = said.plot(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").stat().st_size > 0
    assert len(ax.containers) == len(said.by_part())
    top = max(bar.get_y() + bar.get_height() for bar in ax.patches)
    assert top == pytest.approx(said.weight_bytes_per_device / 2**30)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("tiny", "data=0"), {}, "positive integers"),
        (("tiny", "model=2"), {}, "unknown axes"),
        (("huge", "data=2"), {}, "Unknown variant"),
        ((3, "data=2"), {}, "`model` must be"),
        (("tiny", "data=2"), {"dtype": "int8"}, "`dtype` must be None or one of"),
        (("tiny", "data=2"), {"optimizer": "sgd"}, "`optimizer` must be None or 'adamw'"),
        (("tiny", "data=2"), {"fsdp": 1}, "`fsdp` must be a bool"),
        (("tiny", "data=2"), {"num_labels": -5}, "`num_labels` must be"),
        (("tiny", "data=2"), {"num_labels": 2.5}, "`num_labels` must be"),
        (("tiny", "data=2"), {"num_labels": "a"}, "`num_labels` must be"),
        (
            ("tiny", "tensor=16"),
            {},
            "`linear_key_heads` of 4 is not a multiple of the mesh's tensor=16",
        ),
    ],
)
def test_what_cannot_be_described_is_refused(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        describe_layout(*arguments, **options)
