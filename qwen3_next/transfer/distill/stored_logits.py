"""The likeliest next tokens of a teacher on disk, so that a student learns without it.

A directory holds for N rows of T tokens, at one temperature t:

    teacher_ids.npy          (N, T, n) int32, the n likeliest tokens, the likeliest first
    teacher_log_probs.npy    (N, T, n) float32 or float16, log softmax(logits / t) at these
    teacher_checksums.npy    (N, 2) uint32, CRC-32 of a row of either file
    stored_logits.json       sizes, and what the rows were

What is not among the n is one event of known probability: see `linear_top_kl_divergence`. So the
temperature is chosen when logits are stored; the probability of the rest at another one does not
follow from what is here.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from qwen3_next.checkpoints.staging import files_of, staged
from qwen3_next.config.validation import BOOLEAN, PATH, POSITIVE, Rule, integer, require, shown
from qwen3_next.layers.ops import linear_top_log_probs
from qwen3_next.models.compiled import compile_with_weights
from qwen3_next.models.decisions import lacks_prompts, up_to_first_label
from qwen3_next.models.inputs import (
    check_labels,
    check_token_ids,
    host_array,
    require_inputs,
    step_labels,
    unpack,
)
from qwen3_next.tasks.language_model import Qwen3Next
from qwen3_next.training.step_inputs import StepInputs
from qwen3_next.transfer.distill.frozen_teacher import require_language_model
from qwen3_next.transfer.distill.stored_batches import StoredLogitsDataset, TopLogits
from qwen3_next.transfer.distill.stored_files import (
    CHECKSUMS,
    DESCRIPTION,
    FIELDS,
    FORMAT,
    IDS,
    LOG_PROBS,
    PROMPTS,
    fingerprints,
    memory_map,
    read_description,
    refuse_checkpoints,
)

_FINITE = Rule("finite numbers", lambda x: x.dtype.kind in "buif" and np.isfinite(x).all())
_NUMBERS = Rule("numbers of rows (B,)", lambda x: x.ndim == 1 and x.dtype.kind in "iu")


def store_teacher_logits(
    teacher: Qwen3Next,
    x: Any,
    directory: str | Path,
    top_n: int = 64,
    *,
    y: Any = None,
    temperature: float = 2.0,
    batch_size: int = 8,
    dtype: str = "float32",
    progress: bool = True,
) -> "StoredLogits":
    """Runs a teacher over token ids, once, and writes the likeliest next tokens of every position.

    A token takes `8 top_n` bytes in float32, `6 top_n` in float16 (which rounds probabilities by up
    to 1 % where they are small). Nothing is in `directory` before all of it is written: a run that
    was stopped leaves nothing, and begins anew. Rows can be divided among several directories.

    Args:
        teacher: `Qwen3Next`.
        x: Token ids `(N, T)`, or a dict with `"token_ids"` and optionally `"padding_mask"` and
            `"segment_ids"`, arrays in memory.
        directory: Where to write. Files of an earlier run are replaced.
        top_n: n, tokens to keep of every position, 1 to the size of the vocabulary.
        y: Labels `(N, T)` that the student will be given, or `None` for the next tokens. Only a
            teacher that decides from prompts reads them (layer routers, LoRA experts of rows): a
            prompt is what comes before the first label, as where it teaches by itself.
        temperature: t, by which logits are divided; that of the trainer that will read them.
        batch_size: Rows that the teacher reads at a time.
        dtype: `"float32"` or `"float16"`, of the log-probabilities.
        progress: Whether to show a progress bar.

    Returns:
        `StoredLogits` of the directory.

    Raises:
        ValueError: no `Qwen3Next`, an argument out of range, labels that do not go with `x`, or a
            directory with a checkpoint.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.distill.distillation import DistillationTrainer
    from qwen3_next.transfer.distill.stored_logits import store_teacher_logits

    shape = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_experts": 0}
    teacher, student = (Qwen3Next.from_variant("tiny", **shape) for _ in range(2))
    token_ids = np.random.default_rng(0).integers(0, 64, (4, 8))
    stored = store_teacher_logits(teacher, token_ids, "logits", top_n=16, progress=False)
    trainer = DistillationTrainer(None, student)
    trainer.compile("adamw")
    trainer.fit(stored.dataset(token_ids, batch_size=2), verbose=0)
    ```
    """
    require(PATH, "directory", directory)
    arrays = _checked(teacher, x, top_n, temperature, batch_size, dtype, progress)
    rows, length = arrays["token_ids"].shape
    check_labels(y, teacher.config.vocab_size, ignored=True)
    y = _beside("y", y, ((rows, length),))
    refuse_checkpoints(directory)
    found = fingerprints(arrays)
    if lacks_prompts(teacher.config, unpack(arrays)):
        arrays = {**arrays, "prompt_mask": _prompts(arrays, y)}
        found |= fingerprints({PROMPTS: arrays["prompt_mask"]})
    description = {
        "format": FORMAT,
        "vocab_size": teacher.config.vocab_size,
        "top_n": top_n,
        "temperature": temperature,
        "rows": rows,
        "length": length,
        "dtype": dtype,
        "sha256": found,
    }
    with staged(directory) as folder:
        _write(teacher, arrays, folder, description, batch_size, progress)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    return StoredLogits(directory)


class StoredLogits:
    """Reads what `store_teacher_logits` wrote, from disk and row by row.

    Args:
        directory: Where it is.

    Attributes:
        vocab_size, top_n, temperature, rows, length, dtype: As they were stored.
        ids: `(N, T, n)` int32, a memory map.
        log_probs: `(N, T, n)`, a memory map.

    Raises:
        ValueError: a directory without stored logits, or a file of it that is damaged.

    Example:

    ```python
    import numpy as np
    from qwen3_next import Qwen3Next
    from qwen3_next.transfer.distill.stored_logits import StoredLogits, store_teacher_logits

    teacher = Qwen3Next.from_variant(
        "tiny", vocab_size=64, hidden_size=32, num_layers=1, num_experts=0
    )
    store_teacher_logits(teacher, np.ones((2, 4), int), "logits", top_n=3, progress=False)
    assert StoredLogits("logits").ids.shape == (2, 4, 3)
    ```
    """

    def __init__(self, directory: str | Path) -> None:
        require(PATH, "directory", directory)
        self.directory = Path(directory)
        self._files = files_of(self.directory)
        names = (DESCRIPTION, IDS, LOG_PROBS, CHECKSUMS)
        missing = [name for name in names if name not in self._files]
        if missing:
            raise ValueError(
                f"`directory` must hold stored logits. Received: {directory} without {missing}"
            )
        found = read_description(self._files[DESCRIPTION])
        self.vocab_size: int = found["vocab_size"]
        self.top_n: int = found["top_n"]
        self.temperature: float = found["temperature"]
        self.rows: int = found["rows"]
        self.length: int = found["length"]
        self.dtype: str = found["dtype"]
        self._fingerprints = found["sha256"]
        shape = (self.rows, self.length, self.top_n)
        self.ids = memory_map(self._files[IDS], shape, "int32")
        self.log_probs = memory_map(self._files[LOG_PROBS], shape, self.dtype)
        self._checksums = memory_map(self._files[CHECKSUMS], (self.rows, 2), "uint32")

    def dataset(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 8,
        *,
        sample_weight: Any = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> "StoredLogitsDataset":
        """Batches for `DistillationTrainer.fit`: what the model reads, with the teacher's logits.

        Args:
            x: What the teacher read, token ids `(N, T)` or a dict.
            y: Labels `(N, T)` that line up with the logits, or `None` for the next tokens.
            batch_size: Rows of a batch.
            sample_weight: `(N,)` or `(N, T)`, or `None`.
            shuffle: Whether every epoch has an order of its own.
            seed: Of these orders.

        Raises:
            ValueError: an `x` that is not what the teacher read, labels and weights that do not go
                with it, or labels that leave other prompts to a teacher that decided from these.
        """
        require(integer(1), "batch_size", batch_size)
        require(BOOLEAN, "shuffle", shuffle)
        require(integer(0), "seed", seed)
        require_inputs(x)
        arrays = _arrays(x)
        found, stored = fingerprints(arrays), dict(self._fingerprints)
        prompts = stored.pop(PROMPTS, None)
        if found != stored:
            differing = sorted(k for k, _ in found.items() ^ stored.items())
            raise ValueError(
                f"`x` must be what the teacher of {self.directory} read. Received: an x with other "
                f"{', '.join(dict.fromkeys(differing))}"
            )
        check_labels(y, self.vocab_size, ignored=True)
        whole = (self.rows, self.length)
        others = {
            "y": _beside("y", y, (whole,)),
            "sample_weight": _beside("sample_weight", sample_weight, (whole[:1], whole)),
        }
        if prompts and fingerprints({PROMPTS: _prompts(arrays, y)})[PROMPTS] != prompts:
            raise ValueError(
                f"`y` must begin where it began for the teacher of {self.directory}, which decided "
                f"from what comes before. Received: y={shown(y)}, which leaves other prompts"
            )
        order = np.random.default_rng(seed) if shuffle else None
        return StoredLogitsDataset(self, arrays, others, batch_size, order)

    def read(self, rows: np.ndarray) -> TopLogits:
        """The logits of some rows, checked.

        Args:
            rows: `(B,)` integers.

        Raises:
            ValueError: a row that is not there, or a damaged file.
        """
        rows = host_array("rows", rows)
        require(_NUMBERS, "rows", rows)
        if not ((rows >= 0) & (rows < self.rows)).all():
            raise ValueError(f"`rows` must be in [0, {self.rows}). Received: rows={shown(rows)}")
        found = []
        for column, (name, source) in enumerate(((IDS, self.ids), (LOG_PROBS, self.log_probs))):
            values = np.ascontiguousarray(source[rows])
            for row, value in zip(rows, values):
                if zlib.crc32(value.tobytes()) != self._checksums[row, column]:
                    raise ValueError(
                        f"{self._files[name]} is damaged. Received: row {row}, which is not what "
                        "was written"
                    )
            found.append(values)
        return TopLogits(*found)


def _write(teacher, arrays, folder, description, batch_size, progress):
    rows, length = arrays["token_ids"].shape
    top_n, temperature = description["top_n"], description["temperature"]
    shape = (rows, length, top_n)
    create = np.lib.format.open_memmap
    ids = create(folder / IDS, "w+", "int32", shape)
    log_probs = create(folder / LOG_PROBS, "w+", description["dtype"], shape)
    checksums = np.zeros((rows, 2), "uint32")

    def top(inputs):
        hidden = teacher(StepInputs(inputs), training=False).hidden
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        return linear_top_log_probs(flat, teacher.head_kernel(), top_n, temperature)

    run = compile_with_weights(teacher, top)
    bar = keras.utils.Progbar(rows, unit_name="row") if progress else None
    for start in range(0, rows, batch_size):
        # The last batch is filled up, so that one program reads them all.
        taken = np.minimum(np.arange(start, start + batch_size), rows - 1)
        batch = {name: ops.convert_to_tensor(array[taken]) for name, array in arrays.items()}
        found = (ops.convert_to_numpy(x).reshape(batch_size, length, top_n) for x in run(batch))
        end = min(start + batch_size, rows)
        for column, (target, values) in enumerate(zip((ids, log_probs), found)):
            target[start:end] = values[: end - start]
            checksums[start:end, column] = [
                zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in target[start:end]
            ]
        if bar is not None:
            bar.update(end)
    ids.flush()
    log_probs.flush()
    np.save(folder / CHECKSUMS, checksums)


def _checked(teacher, x, top_n, temperature, batch_size, dtype, progress):
    require_language_model("teacher", teacher)
    require(integer(1, teacher.config.vocab_size), "top_n", top_n)
    require(POSITIVE, "temperature", temperature)
    require(integer(1), "batch_size", batch_size)
    require(FIELDS["dtype"], "dtype", dtype)
    require(BOOLEAN, "progress", progress)
    require_inputs(x)
    check_token_ids(x, teacher.config.vocab_size)
    return _arrays(x)


def _beside(name, value, shapes):
    """Labels or weights of an array's rows, or of their tokens."""
    if value is None:
        return None
    array = host_array(name, value)
    if array.shape not in shapes:
        raise ValueError(
            f"`{name}` must have shape {' or '.join(map(str, shapes))}. "
            f"Received: {name}.shape={array.shape}"
        )
    require(_FINITE, name, array)
    return array


def _prompts(arrays, y):
    """What a step takes for the prompts of labels, `(N, T)` bool."""
    return ops.convert_to_numpy(up_to_first_label(step_labels(unpack(arrays), y)))


def _arrays(x):
    """What a model reads, as NumPy arrays."""
    return {name: ops.convert_to_numpy(value) for name, value in unpack(x).given().items()}
