"""A trained model with a vocabulary as large as the published one.

To learn 151,936 words takes hours without an accelerator. So a model as wide as the variant `tiny`,
of one layer of each kind, learns the demo's 2,048 tokens of Python's standard library, and its
module what the model continues; then both get the large vocabulary. The tokens are spread evenly
over it and keep their rows of the embedding and their columns of the head, the other columns are 0:
the text and the acceptance of drafts stay, and the head costs what the large one costs.
"""

from pathlib import Path

import keras
import numpy as np
from tokenizers import ByteLevelBPETokenizer

from notebooks.standard_library_demo import BATCH, VOCAB_SIZE, encode, optimizer, read_corpus
from qwen3_next import MTPConfig, Qwen3Next, self_distillation_data, wrap_model_with_mtp

WINDOW = 128  # tokens of a row
BUILD = Path(__file__).resolve().parents[1] / "build"


def trained(vocab_size, steps):
    """`(model, prompts)`: it learns for `steps` steps where no run before has; prompts are new."""
    folder = BUILD / f"large_vocabulary_{steps}"
    if not (folder / "arrays.npz").exists():
        _train(folder, steps)
    arrays = np.load(folder / "arrays.npz")
    model = keras.saving.load_model(folder / "model.keras")
    wide, place = widened(model, vocab_size, arrays["met"])
    return wide, place[arrays["prompts"]]


def _train(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    texts, held_out_texts = read_corpus()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB_SIZE, show_progress=False)
    data, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    rows = np.random.default_rng(0).permutation(len(data["token_ids"]))[: steps * BATCH]
    data = {key: value[rows, :WINDOW] for key, value in data.items()}
    layers = {"num_layers": 2, "full_attention_interval": 2}
    base = Qwen3Next.from_variant("tiny", vocab_size=VOCAB_SIZE, **layers)
    base.compile(optimizer(steps))
    base.fit(data, batch_size=BATCH, shuffle=False, verbose=2)
    mtp = MTPConfig(num_predict_tokens=3, speculation_lookahead=3)
    model = wrap_model_with_mtp(base, mtp, freeze_backbone=True)
    starts = [row[:32] for row in data["token_ids"]][:steps]
    own = self_distillation_data(model, starts, WINDOW - 32, batch_size=32, progress=False)
    some = {key: value[: len(rows) // 3] for key, value in data.items()}
    for batch, epochs in ((some, 1), (own, 3)):
        model.compile(optimizer(epochs * len(batch["token_ids"]) // BATCH))
        model.fit(batch, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=2)
    model.save(folder / "model.keras")
    met = np.concatenate([x["token_ids"].reshape(-1) for x in (some, own)])
    prompts = held_out["token_ids"][::50][:4, :64]
    np.savez(folder / "arrays.npz", met=met, prompts=prompts)


def widened(model, vocab_size, met):
    """`(model, place)`: the model with a vocabulary of `vocab_size`, and the new id of every token.

    `met` are token ids of the text that the module learned; they are counted as in `fit`.
    """
    place = np.arange(model.config.vocab_size) * (vocab_size // model.config.vocab_size)
    wide = Qwen3Next(model.config.replace(vocab_size=vocab_size))
    variables = {variable.path: variable for variable in wide.weights}
    for old in model.weights:
        values = keras.ops.convert_to_numpy(old.value)
        if old.path.endswith("embed_tokens/embeddings"):
            values = _spread(values, place, vocab_size)
        elif old.path == "lm_head/kernel":
            values = _spread(values.T, place, vocab_size).T
        variables[old.path].assign(values)
    wide.token_counts.add(keras.ops.convert_to_tensor(place[met].astype("int32")))
    return wide, place


def _spread(rows, place, size):
    spread = np.zeros((size, rows.shape[1]), rows.dtype)
    spread[place] = rows
    return spread
