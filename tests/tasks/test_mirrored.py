"""Two replicas of `tf.distribute.MirroredStrategy` do what one does; what is refused."""

import json
import os
import subprocess
import sys

import keras
import pytest

from qwen3_next import DistillationTrainer, RouterTrainer
from tests.support.paths import ROOT
from tests.support.running import BACKEND
from tests.support.small_models import ONE_LAYER, small

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="a strategy of TensorFlow")
CASES = ("experts", "tied mtp", "classifier", "thinking, accumulated and clipped")


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    path = tmp_path_factory.mktemp("mirrored") / "differences.json"
    command = [sys.executable, "-m", "tests.support.mirrored_runs", str(path)]
    subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=True)
    return json.loads(path.read_text())


def mirrored():
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0"]).scope()


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_equal_one_and_one_of_them_may_have_no_row(differences, case):
    assert {name: x for name, x in differences[case].items() if x > 1e-5} == {}


def test_files_lead_from_one_device_to_replicas_and_back(differences):
    assert [differences[case]["file"] for case in ("experts", "classifier")] == [0.0, 0.0]


def test_no_batch_of_a_generator_is_lost(differences):
    assert differences["a generator"] < 1e-5


def test_other_strategies_are_refused_where_a_model_is_built():
    import tensorflow as tf

    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        with pytest.raises(ValueError, match=r"use JAX and `keras\.distribution`.*OneDevice"):
            small(**ONE_LAYER)


def test_a_model_is_compiled_and_run_in_the_scope_it_was_built_in():
    model = small(**ONE_LAYER)
    model.compile()
    with mirrored():
        inside = small(**ONE_LAYER)
        for run in (model.compile, lambda: model.fit([[1, 2]]), lambda: model.predict([[1, 2]])):
            with pytest.raises(ValueError, match=r"same `strategy\.scope\(\)`.*MirroredStrategy"):
                run()
    with pytest.raises(ValueError, match="`compile` under no strategy"):
        inside.compile()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"jit_compile": True}, "jit_compile=True"),
        (
            {
                "loss": keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True, reduction="mean_with_sample_weight"
                )
            },
            "reduction=",
        ),
        ({"optimizer": ("AdamW", {"use_ema": True, "clipnorm": 1.0})}, "use_ema"),
        ({"optimizer": ("LossScaleOptimizer", {"inner_optimizer": "sgd"})}, "first replica"),
    ],
)
def test_what_replicas_cannot_do_is_refused(options, match):
    with mirrored():
        if "optimizer" in options:
            name, fields = options["optimizer"]
            fields = {k: keras.optimizers.get(v) if v == "sgd" else v for k, v in fields.items()}
            options = {"optimizer": getattr(keras.optimizers, name)(**fields)}
        with pytest.raises(ValueError, match=match):
            small(**ONE_LAYER).compile(**options)


@pytest.mark.parametrize(
    "trainer", [lambda m: RouterTrainer(m), lambda m: DistillationTrainer(m, m)]
)
def test_trainers_of_parts_are_for_one_replica(trainer):
    with mirrored():
        model = small(**ONE_LAYER)
    with pytest.raises(ValueError, match=r"one replica.*Received: MirroredStrategy"):
        trainer(model)
