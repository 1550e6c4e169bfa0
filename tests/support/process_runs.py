"""Runs one of several processes that train, save and load a model together.

    python -m tests.support.process_runs FOLDER PROCESS PROCESSES PORT MESH...

There are eight devices in all. For each mesh, as `DATA,EXPERT,TENSOR`, what a process found is left
in FOLDER/MESH, `found-PROCESS.npz`.
"""

import os
import sys
from pathlib import Path

DEVICES = 8
AXES = ("data", "expert", "tensor")
BATCHES, BATCH, LENGTH = 2, 8, 8
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# A Gated DeltaNet for the mesh with more replicas, attention for the other: one layer is traced.
INTERVALS = {4: 4, 1: 1}


def rows_of(process, processes, replicas):
    """The rows that a process brings, `BATCHES` times its part of a batch, and their number."""
    import numpy as np

    rows = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (BATCHES, BATCH, LENGTH))
    if replicas > 1:
        rows = np.split(rows, processes, axis=1)[process]
    return rows.reshape(-1, LENGTH).astype("int32"), rows.shape[1]


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def train(process, processes, replicas):
    """A model that was trained on the rows of all, and what is known of it."""
    import keras

    from qwen3_next import Qwen3Next

    x, batch = rows_of(process, processes, replicas)
    keras.utils.set_random_seed(0)
    model = Qwen3Next.from_variant("tiny", **SIZES, full_attention_interval=INTERVALS[replicas])
    model.compile(keras.optimizers.AdamW(1e-3))
    history = model.fit(x, batch_size=batch, epochs=2, shuffle=False, verbose=0).history
    found = {
        "losses": history["loss"],
        "evaluated": model.evaluate(x, batch_size=batch, verbose=0),
        "on_batch": model.test_on_batch(x[:batch]),
        "predicted": model.predict(x, batch_size=batch, verbose=0),
        "predicted_on_batch": model.predict_on_batch(x[:batch]),
    }
    if processes > 1:
        found |= refusals(model, x, batch, process)
    return model, found


def refusals(model, x, batch, process):
    """What is said of data that would leave a process waiting for the others."""
    import keras

    more = x[: batch * (1 + process)]
    wrong = x + SIZES["vocab_size"] * process
    found = {
        "others": message_of(lambda: model.fit(more, batch_size=batch, verbose=0)),
        "wrong": message_of(lambda: model.predict(wrong, batch_size=batch, verbose=0)),
    }
    replicas = keras.distribution.distribution().num_model_replicas
    if replicas > 2:
        found["uneven"] = message_of(lambda: model.fit(x[: batch + 1], batch_size=batch, verbose=0))
    return found


def files(model, folder):
    """Largest differences of what was saved and loaded again, by file."""
    import keras
    import numpy as np

    from qwen3_next import Qwen3Next
    from qwen3_next.layers.ops.backend.shards import whole_array

    model.save_to_preset(f"{folder}/preset")
    model.export_to_transformers(f"{folder}/published")
    model.save(f"{folder}/model.keras")
    model.save_weights(f"{folder}/model.weights.h5")
    loaded = {
        name: Qwen3Next.from_preset(f"{folder}/{name}", progress=False)
        for name in ("preset", "published")
    }
    loaded["keras"] = keras.saving.load_model(f"{folder}/model.keras")
    values = [whole_array(variable) for variable in model.weights]
    found = {}
    for name, other in loaded.items():
        pairs = zip(values, other.weights, strict=True)
        found[name] = max(np.abs(value - whole_array(variable)).max() for value, variable in pairs)
    found["steps"] = whole_array(loaded["keras"].optimizer.iterations)
    found["saved"] = sorted(path.name for path in Path(folder).iterdir())
    return found


def fails_together(model, folder):
    """What every process raises where the first cannot write."""
    with open(f"{folder}/file", "a"):
        pass
    try:
        model.save_weights(f"{folder}/file/model.weights.h5")
    except OSError as error:
        return type(error).__name__
    return ""


def main(folder, process, processes, port, meshes):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={DEVICES // processes}"
    )
    import keras
    import numpy as np

    if processes > 1:
        keras.distribution.initialize(f"localhost:{port}", processes, process)
    from qwen3_next import distribute

    for mesh in meshes:
        sizes = [int(size) for size in mesh.split(",")]
        with distribute(",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))).scope():
            model, found = train(process, processes, sizes[0])
            found |= files(model, f"{folder}/{mesh}")
            found["failure"] = fails_together(model, f"{folder}/{mesh}")
        np.savez(f"{folder}/{mesh}/found-{process}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:])
