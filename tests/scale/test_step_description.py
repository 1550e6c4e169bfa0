"""What a step costs at the published sizes, compiled for shapes alone."""

import functools
import math
import os
import subprocess
import sys

import pytest

from qwen3_next import (
    MTPConfig,
    Qwen3NextBackbone,
    Qwen3NextConfig,
    describe_layout,
    describe_step,
)
from tests.support.devices import WIDE, eight_devices, jax_only
from tests.support.paths import ROOT
from tests.support.small_models import ONE_LAYER, small
from tests.support.xla_flags import DEVICES

PUBLISHED = Qwen3NextConfig.from_variant("80b_a3b", num_layers=2, full_attention_interval=2)
SMALL = Qwen3NextConfig.from_variant("tiny", num_layers=2, **WIDE)
ROWS, LENGTH = 8, 1024


@functools.cache
def step(mesh):
    return describe_step(PUBLISHED, mesh, batch_size=ROWS, length=LENGTH)


@eight_devices
@pytest.mark.parametrize(
    ("mesh", "most"),
    [("data=8", 1.001), ("expert=8", 1.01), ("data=2,expert=2,tensor=2", 1.15)],
)
def test_a_step_receives_what_it_must_and_little_more(mesh, most):
    found = step(mesh)
    assert found.received <= most * sum(found.least.values())


@eight_devices
def test_no_device_makes_the_stack_of_all_experts_or_the_logits_of_all_rows():
    config = PUBLISHED
    stack = config.num_experts * config.hidden_size * 2 * config.moe_intermediate_size
    logits = ROWS * LENGTH * config.vocab_size
    for mesh in ("expert=8", "data=2,expert=2,tensor=2"):
        largest = max(step(mesh).arrays.values())
        assert largest < 4 * stack / 2
        assert largest < 4 * logits / 2


@eight_devices
def test_what_a_device_holds_falls_with_the_devices_as_described():
    for mesh in ("data=8", "expert=8", "data=2,expert=2,tensor=2"):
        layout = describe_layout(PUBLISHED, mesh, dtype="float32", optimizer="adamw")
        held = layout.weight_bytes_per_device + layout.optimizer_bytes_per_device
        assert math.isclose(step(mesh).state_bytes, held, rel_tol=1e-3)
    assert step("expert=8").state_bytes < step("data=8").state_bytes / 3


SIXTY_FOUR = """
from tests.scale.test_step_description import PUBLISHED
from qwen3_next import describe_step
from qwen3_next.models.weight_table import weight_table

step = describe_step(PUBLISHED, "data=8,expert=8", batch_size=64, length=1024, fsdp=True)
assert step.received < 1.1 * sum(step.least.values()), str(step)
held = 3 * 4 * sum(weight.size for weight in weight_table(PUBLISHED))  # with AdamW's means
assert step.state_bytes < 1.05 * held / 64, str(step)
stack = PUBLISHED.num_experts * PUBLISHED.hidden_size * 2 * PUBLISHED.moe_intermediate_size
assert max(step.arrays.values()) < 4 * stack / 2, str(step)
"""


@jax_only
def test_sixty_four_devices_hold_and_receive_their_part():
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {DEVICES}=64"}
    command = [sys.executable, "-c", SIXTY_FOUR]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@eight_devices
def test_a_step_is_printed_with_the_least_beside_it():
    text = str(step("expert=8"))
    assert "all-gather" in text and "least possible" in text and "expert=8" in text


@jax_only
def test_what_is_not_reckoned_has_no_least():
    mtp = MTPConfig(1, speculation_lookahead=1)
    config = SMALL.replace(num_layers=1, mlp_only_layers=(), num_experts=0, mtp=mtp)
    assert describe_step(config, "data=1", batch_size=1, length=16).least == {}


@jax_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"length": True}, "length"),
        ({"dtype": "int8"}, "dtype"),
        ({"mesh": "data=999"}, "mesh"),
        ({"model": 3}, "`model` must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    arguments = {"model": SMALL, "mesh": "data=1", "batch_size": 1, "length": 8, **changes}
    with pytest.raises(ValueError, match=message):
        describe_step(**arguments)


@jax_only
def test_another_model_than_a_language_model_has_no_step_described():
    backbone = small(Qwen3NextBackbone, **ONE_LAYER)
    with pytest.raises(ValueError, match=r"`model` must be .*Qwen3Next.*Received: model="):
        describe_step(backbone, "data=1", batch_size=1, length=8)
