"""Runs models on one device and on two replicas, and writes how far apart they end.

    python -m tests.support.mirrored_runs differences.json

TensorFlow takes the number of its devices before it starts them: hence a process of its own.
"""

import contextlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from qwen3_next import GroupedAdamW, MTPConfig, Qwen3Next, Qwen3NextClassifier
from tests.support.routed_models import routed
from tests.support.small_models import ONE_LAYER, random_ids, small

LIGHT = {**ONE_LAYER, "layer_types": ("full_attention",), "router_aux_loss_coef": 0.3}
DENSE = {"num_experts": 0, "shared_expert_intermediate_size": 0, "layer_types": None}
TIED = {**LIGHT, "tie_word_embeddings": True}
MTP = MTPConfig(2, speculation_lookahead=2, warmup_steps=4, draft_vocab_size=16)
THINKING = {
    "kind": "experts",
    "num_layers": 2,
    "layer_types": ("full_attention",) * 2,
    "etd": {
        "n_think_layers": 1,
        "max_think_iterations": 2,
        "adaptive_depth": True,
        "ponder_cost": 0.1,
        "lora_expert": {"rank": 2},
    },
}

# Three steps: rows of different lengths, with different numbers of labels, and a row without any;
# the last batch has two rows for one replica and one for the other.
IDS = random_ids(11, 8)
MASK = np.arange(8)[None] < np.array([8, 7, 2, 3, 8, 5, 4, 6, 8, 2, 3])[:, None]
INPUTS = {"token_ids": IDS, "padding_mask": MASK}
DROPPED = np.random.default_rng(1).random((11, 8)) < np.linspace(0.1, 1.0, 11)[:, None]
LABELS = np.where(DROPPED, -100, random_ids(11, 8, seed=5)).astype("int32")
CLASSES = np.arange(11) % 3


def adamw(**options):
    return keras.optimizers.AdamW(1e-3, epsilon=1e-3, **options)


def grouped():
    return GroupedAdamW(1e-3, {"experts": 0.5}, epsilon=1e-3)


# name: model, optimizer, data, options of `compile`
ACCURACY = {"metrics": ["accuracy"], "weighted_metrics": ["sparse_categorical_accuracy"]}
CASES = {
    "experts": (partial(small, **LIGHT), adamw, (INPUTS, LABELS), ACCURACY),
    "tied mtp": (
        partial(small, **LIGHT, mtp=MTP, tie_word_embeddings=True),
        grouped,
        (INPUTS,),
        {},
    ),
    "classifier": (
        partial(small, Qwen3NextClassifier, num_labels=3, **LIGHT),
        adamw,
        (INPUTS, CLASSES),
        {"metrics": ["accuracy"]},
    ),
    "dense, accumulated and clipped": (
        partial(small, **{**LIGHT, **DENSE}),
        partial(adamw, gradient_accumulation_steps=2, global_clipnorm=0.5),
        (INPUTS, LABELS),
        {},
    ),
    "thinking": (partial(routed, Qwen3Next, **THINKING), adamw, (INPUTS,), {}),
}


# Programs take long to compile: what is common to all cases is run for one of them.
PREDICTED, GENERATED = ("experts",), ("tied mtp",)


def results(name, model, data):
    """What training, evaluation and generation leave, as lists of arrays by name."""
    history = model.fit(*data, batch_size=4, shuffle=False, verbose=0).history
    few = keras.tree.map_structure(lambda x: x[:3], data)  # the first batch is uneven, too
    found = {
        "fit": [history[name] for name in sorted(history)],
        "evaluate": [model.evaluate(*few, verbose=0)],
        "weights": [weight.numpy() for weight in model.weights],
    }
    if name in PREDICTED:
        found["predict"] = [model.predict(few[0], verbose=0)]
        found["on batch"] = [model.test_on_batch(*few), model.predict_on_batch(few[0])]
    if name in GENERATED:
        found["generate"] = list(model.generate([[1, 2, 3], [4]], 4).tokens)
    return found


def differences(ours, others):
    """The largest difference by name, in units of the expected size."""

    def off(a, b):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        return float(np.abs(a - b).max(initial=0.0) / max(1.0, np.abs(b).max(initial=0.0)))

    return {k: max(off(a, b) for a, b in zip(ours[k], others[k], strict=True)) for k in others}


def copies_apart(model):
    """The largest difference between the copies of a variable."""
    pairs = (variable.value.values for variable in (*model.weights, *model.optimizer.variables))
    return max(float(np.abs(a.numpy() - b.numpy()).max(initial=0.0)) for a, b in pairs)


def files_apart(single, mirrored, strategy):
    """How far a file leads from the model that it was saved from, there and back."""
    with tempfile.TemporaryDirectory() as folder:
        single.save(Path(folder) / "single.keras")
        mirrored.save(Path(folder) / "mirrored.keras")
        alone = keras.models.load_model(Path(folder) / "mirrored.keras")
        with strategy.scope():
            spread = keras.models.load_model(Path(folder) / "single.keras")
    losses = [
        model.fit(IDS[:4], LABELS[:4], batch_size=4, verbose=0).history["loss"][0]
        for model in (single, mirrored, alone, spread)
    ]
    return max(losses) - min(losses)


def empty_replica(model):
    """The loss of an epoch whose last batch has one row, so that a replica has none."""
    return model.fit(IDS[:5], LABELS[:5], batch_size=4, shuffle=False, verbose=0).history["loss"][0]


def from_generator(model):
    """The loss of an epoch over a generator, which gives every batch once."""
    batches = ((IDS[i : i + 4], LABELS[i : i + 4]) for i in (0, 4))
    return model.fit(batches, verbose=0).history["loss"][0]


def main(path):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {}
    for name, (make, optimizer, data, options) in CASES.items():
        models = []
        for scope in (contextlib.nullcontext(), strategy.scope()):
            with scope:
                models.append(make())
                models[-1].compile(optimizer(), **options)
        single, mirrored = models
        found[name] = differences(results(name, mirrored, data), results(name, single, data))
        found[name]["copies"] = copies_apart(mirrored)
        if name == "experts":
            found["files"] = files_apart(single, mirrored, strategy)
            found["an empty replica"] = abs(empty_replica(single) - empty_replica(mirrored))
            found["a generator"] = abs(from_generator(single) - from_generator(mirrored))
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
