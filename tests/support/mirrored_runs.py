"""Runs models on one device and on two replicas, and writes how far apart they end.

    python -m tests.support.mirrored_runs differences.json

TensorFlow takes the number of its devices before it starts them: hence a process of its own.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from qwen3_next import GroupedAdamW, MTPConfig, Qwen3Next, Qwen3NextClassifier
from qwen3_next.tasks.task import build_optimizer
from tests.support.routed_models import routed
from tests.support.small_models import ONE_LAYER, random_ids, small

EXPERTS = {**ONE_LAYER, "layer_types": ("full_attention",), "router_aux_loss_coef": 0.3}
DENSE = {**EXPERTS, "num_experts": 0, "shared_expert_intermediate_size": 0}
MTP = MTPConfig(1, speculation_lookahead=1, warmup_steps=4, draft_vocab_size=16)
THINKING = {
    **DENSE,
    "kind": "experts",
    "etd": {
        "n_encoder_layers": 0,
        "n_think_layers": 1,
        "max_think_iterations": 2,
        "adaptive_depth": True,
        "ponder_cost": 0.1,
        "lora_expert": {"rank": 2},
    },
}

# Rows of different lengths, with different numbers of labels, and a row without any. Of a batch of
# three one replica has two rows and the other one; of the last batch one replica has no row.
ROWS, BATCH = 7, 3
IDS = random_ids(ROWS, 8)
MASK = np.arange(8)[None] < np.array([8, 7, 2, 3, 8, 4, 6])[:, None]
INPUTS = {"token_ids": IDS, "padding_mask": MASK}
SHARES = np.array([0.1, 0.2, 0.4, 0.5, 0.6, 1.0, 0.3])[:, None]
DROPPED = np.random.default_rng(1).random((ROWS, 8)) < SHARES
LABELS = np.where(DROPPED, -100, random_ids(ROWS, 8, seed=5)).astype("int32")
CLASSES = np.arange(ROWS) % 3


def adamw(**options):
    return keras.optimizers.AdamW(1e-3, epsilon=1e-3, **options)


def grouped():
    return GroupedAdamW(1e-3, {"embed_tokens": 0.5}, epsilon=1e-3)


# name: model, optimizer, data, options of `compile`
ACCURACY = {"metrics": ["accuracy"], "weighted_metrics": ["sparse_categorical_accuracy"]}
CASES = {
    "experts": (partial(small, **EXPERTS), adamw, (INPUTS, LABELS), ACCURACY),
    "tied mtp": (
        partial(small, **DENSE, mtp=MTP, tie_word_embeddings=True),
        grouped,
        (INPUTS,),
        {},
    ),
    "classifier": (
        partial(small, Qwen3NextClassifier, num_labels=3, **EXPERTS),
        adamw,
        (INPUTS, CLASSES),
        {"metrics": ["accuracy"]},
    ),
    "thinking, accumulated and clipped": (
        partial(routed, Qwen3Next, **THINKING),
        partial(adamw, gradient_accumulation_steps=2, global_clipnorm=0.5),
        (INPUTS,),
        {},
    ),
}
# Programs take long to trace: what is common to all cases is run for one of them.
COMPARED, GENERATED = ("experts",), ("tied mtp",)
TO_REPLICAS, TO_ONE_DEVICE = ("experts",), ("classifier",)


def made(name, strategy, folder):
    """A case's model on one device and on replicas, one of them from a file of the other, and how
    far the file led from what it was saved from."""
    make, optimizer, _, options = CASES[name]

    def new():
        model = make()
        model.compile(optimizer(), **options)
        return model

    path = Path(folder) / f"{name}.keras"
    if name in TO_ONE_DEVICE:
        with strategy.scope():
            mirrored = saved(new(), path)
        single = keras.models.load_model(path)
    else:
        single = saved(new(), path) if name in TO_REPLICAS else new()
        with strategy.scope():
            mirrored = keras.models.load_model(path) if name in TO_REPLICAS else new()
    single.run_eagerly = True  # a few steps take less than a program
    pairs = zip(state(single), state(mirrored), strict=True)
    return single, mirrored, max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs)


def saved(model, path):
    """The model, which is left in a file with an optimizer as if it had made steps."""
    build_optimizer(model)
    rng = np.random.default_rng(2)
    for variable in model.optimizer.variables:
        if variable.shape:
            variable.assign(rng.uniform(0.0, 1e-3, variable.shape))
    model.optimizer.iterations.assign(3)
    model.save(path)
    return model


def state(model):
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]


def results(name, model, data):
    """What training, evaluation and prediction leave, as lists of arrays by name."""
    history = model.fit(*data, batch_size=BATCH, shuffle=False, verbose=0).history
    found = {
        "fit": [history[name] for name in sorted(history)],
        "weights": [weight.numpy() for weight in model.weights],
    }
    if name in COMPARED:
        few = rows(0, BATCH, data)
        found["evaluate"] = [model.evaluate(*few, verbose=0)]
        found["predict"] = [model.predict(few[0], verbose=0)]
        found["on batch"] = [model.test_on_batch(*few), model.predict_on_batch(few[0])]
    return found


def rows(start, end, data):
    return keras.tree.map_structure(lambda x: x[start:end], data)


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


def generated(model):
    return np.stack(model.generate([[1, 2, 3], [4, 5, 6]], 4, use_speculative=True).tokens)


def greedy(model):
    """The likeliest tokens one after the other, from passes over all there is."""
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    for _ in range(4):
        ids = np.concatenate([ids, model(ids).numpy()[:, -1:].argmax(-1)], axis=1)
    return ids[:, 3:]


def from_generator(model, data):
    """The loss of a run over a generator, which gives every batch once."""
    batches = (rows(start, start + BATCH, data) for start in (0, BATCH))
    return model.evaluate(batches, verbose=0, return_dict=True)["loss"]


def main(path):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {}
    for name, (*_, data, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            single, mirrored, apart = made(name, strategy, folder)
        found[name] = differences(results(name, mirrored, data), results(name, single, data))
        found[name]["copies"] = copies_apart(mirrored)
        if name in (*TO_REPLICAS, *TO_ONE_DEVICE):
            found[name]["file"] = apart
        if name in GENERATED:
            found[name]["generate"] = float((generated(mirrored) != greedy(single)).sum())
        if name == "experts":
            apart = from_generator(single, data) - from_generator(mirrored, data)
            found["a generator"] = abs(apart)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
