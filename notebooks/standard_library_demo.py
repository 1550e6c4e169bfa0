"""Trains a small hybrid MoE model on the source of Python's standard library.

Every machine with Python has the corpus. A byte-pair tokenizer and the model learn from most of
its files, the rest measure the result against unigram and bigram baselines; then the model writes
code, is saved, loaded again, and writes the same code. At last a module for multi-token prediction
learns on top of it, and the model writes the same code faster.
"""

import argparse
import os
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib
import numpy as np
from tokenizers import ByteLevelBPETokenizer

from qwen3_next import GroupedAdamW, MTPConfig, Qwen3Next, wrap_model_with_mtp

matplotlib.use("Agg")

VOCAB_SIZE, CONTEXT, BATCH = 2048, 256, 8
PROMPT = "def read_lines(path):\n"


def read_corpus():
    """The library's own modules, without tests: `(training, held out)` lists of source texts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts)
    ]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    texts = [text for text in texts if text.strip()]
    held_out = texts[::20]
    return [text for i, text in enumerate(texts) if i % 20], held_out


def encode(tokenizer, texts):
    """One stream of tokens cut into windows, with the number of the file each token is from."""
    encoded = [row.ids for row in tokenizer.encode_batch(texts)]
    stream = np.concatenate(encoded).astype("int32")
    files = np.repeat(np.arange(len(encoded), dtype="int32"), [len(ids) for ids in encoded])
    windows = len(stream) // CONTEXT
    shape = (windows, CONTEXT)
    cut = slice(0, windows * CONTEXT)
    return {"token_ids": stream[cut].reshape(shape), "segment_ids": files[cut].reshape(shape)}


def baselines(train, held_out):
    """Held-out loss in nats per token of a unigram and a bigram model."""
    ids = train["token_ids"].reshape(-1)
    unigram = np.bincount(ids, minlength=VOCAB_SIZE) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1.0)
    # Seen pairs, backed off to the unigram with the weight of 20 observations.
    bigram = (pairs + 20.0 * unigram) / (pairs.sum(1, keepdims=True) + 20.0)
    first, second = held_out["token_ids"][:, :-1], held_out["token_ids"][:, 1:]
    same_file = held_out["segment_ids"][:, :-1] == held_out["segment_ids"][:, 1:]
    return (
        -np.log(unigram[second][same_file]).mean(),
        -np.log(bigram[first, second][same_file]).mean(),
    )


def build_model(layers=4):
    return Qwen3Next(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        # Pooled over layers, as published, the loss would leave one expert of a layer with several
        # times its share: layers make up for one another.
        router_aux_loss_scope="layer",
        router_aux_loss_coef=0.05,
    )


class LossHistory(keras.callbacks.Callback):
    """Keeps the running mean of the training loss every few steps."""

    def __init__(self, every=10):
        super().__init__()
        self.every, self.steps, self.losses = every, [], []
        self._seen = 0.0

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.every == 0:
            # Keras reports the mean since the epoch began; the difference is that of this stretch.
            total = logs["loss"] * (batch + 1)
            self.steps.append(batch + 1)
            self.losses.append((total - self._seen) / self.every)
            self._seen = total


def plot(history, held_out, unigram, bigram, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(history.steps, history.losses, label="training")
    axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram {unigram:.2f}")
    axes.axhline(bigram, color="tab:brown", linestyle="--", label=f"bigram {bigram:.2f}")
    axes.axhline(held_out, color="tab:green", label=f"held out {held_out:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats / token)", title="Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def optimizer(steps):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.1, warmup_target=3e-3, warmup_steps=max(steps // 10, 1)
    )
    return GroupedAdamW(schedule, {"router": 0.5}, weight_decay=0.05, clipnorm=1.0)


def speed_up(model, data, steps, prompts, new_tokens=128):
    """Trains a module to draft and prints what it is worth; returns the model with the module."""
    model = wrap_model_with_mtp(model, MTPConfig(num_predict_tokens=4), freeze_backbone=True)
    model.compile(optimizer(steps))
    model.fit(data, batch_size=BATCH, shuffle=False)
    print(f"{'drafts':>6}{'tokens/step':>13}{'time':>8}   accepted by position")
    for lookahead in range(1, 5):
        ratios, speeds, rates = [], [], []
        for prompt in prompts:
            plain, _ = model.generate([prompt], new_tokens, use_speculative=False)
            tokens, stats = model.generate(
                [prompt], new_tokens, speculation_lookahead=lookahead, measure_baseline=True
            )
            if not np.array_equal(tokens[0], plain[0]):
                raise SystemExit("speculative decoding generated something else")
            ratios.append(stats["wall_clock_speedup"])
            speeds.append(stats["tokens_per_step"])
            rates.append(stats["acceptance_rate_by_position"])
        shares = "  ".join(f"{rate:.0%}" for rate in np.mean(rates, axis=0))
        print(f"{lookahead:>6}{np.mean(speeds):>13.2f}{np.mean(ratios):>7.2f}x   {shares}")
    for prompt in prompts:  # the first calls measure
        _, stats = model.generate([prompt], new_tokens)
    print(f"left to choose, generation goes on with {stats['lookahead']} drafts per step")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--module-steps", type=int, default=200, help="of the drafting module")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)

    texts, held_out_texts = read_corpus()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB_SIZE, show_progress=False)
    tokenizer.save(str(options.out / "tokenizer.json"))
    train, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    held_out = {key: value[:200] for key, value in held_out.items()}
    print(
        f"{len(texts)} files to learn from, {len(held_out_texts)} held out; "
        f"{train['token_ids'].size:,} tokens, {VOCAB_SIZE} of them different"
    )

    model = build_model()
    print(f"{model.count_params():,} parameters on {keras.backend.backend()}")
    rows = np.random.default_rng(0).permutation(len(train["token_ids"]))[: options.steps * BATCH]
    model.compile(optimizer(options.steps))
    history = LossHistory()
    started = time.perf_counter()
    model.fit(
        {key: value[rows] for key, value in train.items()},
        batch_size=BATCH,
        shuffle=False,
        callbacks=[history],
    )
    print(f"trained in {time.perf_counter() - started:.0f} s")

    found = model.evaluate(held_out, batch_size=BATCH, verbose=0, return_dict=True)
    loss, busiest = found["loss"], found["expert_load_max"]
    unigram, bigram = baselines(train, held_out)
    print(f"held-out loss {loss:.3f} nats/token; unigram {unigram:.3f}, bigram {bigram:.3f}")
    print(f"the busiest expert has {busiest:.1f} times the tokens of an even share")
    plot(history, loss, unigram, bigram, options.out / "loss.png")

    prompt = tokenizer.encode(PROMPT).ids
    sampling = {"max_new_tokens": 96, "temperature": 0.6, "top_p": 0.9, "seed": 1}
    tokens, stats = model.generate([prompt], **sampling)
    print(f"\n{PROMPT}{tokenizer.decode(tokens[0].tolist())}\n")

    path = options.out / "model.keras"
    model.save(path)
    again, _ = keras.models.load_model(path).generate([prompt], **sampling)
    if not np.array_equal(tokens[0], again[0]):
        raise SystemExit("the loaded model generated something else")
    print(f"{path} loaded again generates the same {len(again[0])} tokens")
    _, stats = model.generate([prompt], **sampling)
    print(
        f"{stats['tokens_per_second']:.0f} tokens/s once compiled; curve in {options.out}/loss.png"
    )

    rows = np.random.default_rng(1).permutation(len(train["token_ids"]))
    data = {key: value[rows[: options.module_steps * BATCH]] for key, value in train.items()}
    prompts = [row[:64] for row in held_out["token_ids"][::50][:4]]
    speed_up(model, data, options.module_steps, prompts).save(options.out / "model_mtp.keras")


if __name__ == "__main__":
    main()
