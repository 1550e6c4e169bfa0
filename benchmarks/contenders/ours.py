"""This project."""

from pathlib import Path

import keras
import numpy as np
from keras import ops

from benchmarks.contenders import (
    Work,
    delta_rule_inputs,
    kernel_products,
    moe_inputs,
    output_gradient,
    relative_error,
    token_ids,
)
from benchmarks.contenders.keras_work import fit, forward, gradient, predict
from benchmarks.contenders.keras_work import train as train_work
from qwen3_next import Qwen3Next, Qwen3NextConfig, create_hybrid_from_qwen3, describe_step
from qwen3_next.layers import SparseMoE
from qwen3_next.layers.ops import gated_delta_rule, linear_cross_entropy
from tests.support import oracles

DEMO = Path(__file__).resolve().parents[2] / "demo"


def build(config, think_iterations=None, dtype=None, **options):
    config = dict(config)
    if think_iterations is not None:
        config["etd"] = {**config["etd"], "max_think_iterations": think_iterations}
    return Qwen3Next(Qwen3NextConfig.from_dict(config), dtype=dtype, **options)


def prefill(config, batch, length, think_iterations=None):
    model = build(config, think_iterations)
    return forward(model, model.variables, token_ids(config, batch, length))


def read(config, batch, length, asks=False, route=None):
    """The layers alone: a prompt needs the head once, whatever its length."""
    model = build(config).backbone
    ids, decisions = token_ids(config, batch, length), {}
    if asks:
        decisions["prompt_mask"] = np.ones((batch, length), bool)
    if route is not None:
        decisions["route"] = np.tile(route, (batch, 1)).astype("int32")
    decisions = {name: ops.convert_to_tensor(value) for name, value in decisions.items()}

    def call(ids):
        return model({"token_ids": ids, **decisions})

    return forward(call, model.variables, ids)


def train(config, batch, length, think_iterations=None, gradient_checkpointing=False, sequences=1):
    """`sequences` are packed into every row."""
    model = build(config, think_iterations, gradient_checkpointing=gradient_checkpointing)
    # On TensorFlow Keras leaves XLA out on a CPU unless it is asked. For KerasHub it is not: there
    # a step takes longer with XLA.
    model.compile(keras.optimizers.AdamW(1e-4), jit_compile=True)
    ids = token_ids(config, batch, length + 1)
    inputs = {"token_ids": ids[:, :-1]}
    if sequences > 1:
        segments = np.arange(length, dtype="int32") * sequences // length
        inputs["segment_ids"] = np.tile(segments, (batch, 1))
    return train_work(model, inputs, ids[:, 1:])


def decode(
    config,
    batch,
    length,
    new,
    think_iterations=None,
    prompts=None,
    asks=False,
    route=None,
    dtype=None,
):
    del asks  # `generate` does, unless it is told a route
    model = build(config, think_iterations, dtype)
    ids = token_ids(config, batch, length)
    if prompts is not None:
        easy = halt_by_vocabulary(model)
        rows = {"easy": [True], "hard": [False], "easy and hard": [True, False]}[prompts]
        ids %= easy
        ids[~np.resize(rows, batch)] += easy
    found = []

    def run():
        found[:] = [model.generate(ids, new, **({} if route is None else {"route": route}))]

    def notes():
        return {"mean_iterations": found[0].stats["think_iterations"]}

    return Work(run, units=batch * new, notes=notes if prompts is not None else None)


def read_prompts(config, lengths):
    model, prompts = build(config), [token_ids(config, 1, length)[0] for length in lengths]
    return Work(lambda: model.generate(prompts, 1))


def halt_by_vocabulary(model):
    """Makes the first half of the vocabulary easy and the other half hard, by hand.

    One direction of the residual stream tells the halves apart: embeddings have it, the halting
    unit reads it, so that easy tokens halt after one iteration and hard ones never, and the head
    lets each half follow itself. Returns the number of easy tokens.
    """
    easy = model.config.vocab_size // 2
    sign = np.where(np.arange(2 * easy) < easy, 1.0, -1.0)
    direction = np.zeros(model.config.hidden_size)
    direction[0] = 1.0
    embeddings, head = model.backbone.embed_tokens.embeddings, model.lm_head.kernel
    embeddings.assign_add(np.outer(sign, direction).astype("float32"))
    head.assign_add(np.outer(direction, sign).astype("float32"))
    halting = model.backbone.think_loop.halting_unit
    halting.score.kernel.assign(50.0 * direction[:, None])
    return easy


def first_predict(config, batch, length):
    return predict(build(config), token_ids(config, batch, length))


def first_fit(config, batch, length):
    model = build(config)
    model.compile(keras.optimizers.AdamW(1e-4))
    ids = token_ids(config, batch, length + 1)
    return fit(model, ids[:, :-1], ids[:, 1:])


first_generate = decode


def speculate(lookahead, new):
    """The trained model of `make demo`, plain for no drafts, batch 1, one prompt after another."""
    from tokenizers import Tokenizer

    from notebooks.standard_library_demo import read_corpus

    if not (DEMO / "model_mtp.keras").exists():
        raise FileNotFoundError(f"{DEMO}/model_mtp.keras is not there: run `make demo` first")
    model = keras.saving.load_model(DEMO / "model_mtp.keras")
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompts = [tokenizer.encode(text[:2000]).ids[:64] for text in read_corpus()[1][:8]]
    return _speculation(model, prompts, new, lookahead)


def speculate_large(lookahead, new, vocab_size, steps, draft_vocabulary=None):
    """As `speculate`, a model of a large vocabulary, see `benchmarks.large_vocabulary`."""
    from benchmarks.large_vocabulary import trained

    model, prompts = trained(vocab_size, steps)
    return _speculation(model, prompts, new, lookahead, draft_vocabulary)


def convert(mebibytes):
    """A checkpoint like Qwen3's becomes a hybrid, read one weight at a time."""
    from benchmarks.qwen3_checkpoint import checkpoint

    directory, found = checkpoint(mebibytes), {}

    def run():
        model = create_hybrid_from_qwen3(directory, dtype="bfloat16", progress=False)
        sizes = [np.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.weights]
        found["model_mib"] = float(sum(sizes)) / 2**20
        found["largest_weight_mib"] = float(max(sizes)) / 2**20

    return Work(run, units=1, notes=lambda: found)


def step_on_devices(config, mesh, fsdp, batch, length):
    """What devices hold and receive, read from a step that is compiled for shapes alone."""

    def run():
        config_of = Qwen3NextConfig.from_dict(config)
        return describe_step(config_of, mesh, fsdp=fsdp, batch_size=batch, length=length)

    def notes():
        step, kinds = run(), {}
        for row in step.collectives:
            kinds[row.kind] = kinds.get(row.kind, 0.0) + row.received
        return {
            "collectives": sum(row.times for row in step.collectives),
            "received_bytes": step.received,
            "received_bytes_by_kind": kinds,
            "least_bytes": sum(step.least.values()),
            "least_bytes_by_cause": step.least,
            "held_bytes": step.state_bytes,
            "work_bytes": step.work_bytes,
        }

    return Work(run, notes=notes)


def _speculation(model, prompts, new, lookahead, draft_vocabulary=None):
    options = {"use_speculative": False}
    if lookahead:
        options = {"speculation_lookahead": lookahead, "draft_vocabulary": draft_vocabulary}
    found = []

    def run():
        found[:] = [model.generate([prompt], new, **options) for prompt in prompts]

    def notes():
        if not lookahead:
            return {}
        rates = [generation.stats["acceptance_rate_by_position"] for generation in found]
        steps = [generation.stats["tokens_per_step"] for generation in found]
        return {
            "acceptance_rate_by_position": np.mean(rates, axis=0).tolist(),
            "tokens_per_step": float(np.mean(steps)),
            "draft_vocab_size": found[0].stats["draft_vocab_size"],
        }

    return Work(run, units=new * len(prompts), notes=notes)


def _rule(*inputs):
    return gated_delta_rule(*inputs).output


def delta_rule(length, heads, dim):
    inputs = delta_rule_inputs(length, heads, dim)
    work = forward(_rule, [], *inputs)

    def error():
        return relative_error(work.run(), oracles.gated_delta_rule(*inputs)[0])

    return work._replace(error=error)


def delta_rule_grad(length, heads, dim):
    return gradient(_rule, [], *delta_rule_inputs(length, heads, dim))


def _moe(work_of, tokens, width, experts, chosen, inner):
    rows, *weights = moe_inputs(tokens, width, experts, chosen, inner)
    layer = SparseMoE(experts, chosen, inner)
    layer.build((None, None, width))
    for variable, value in zip(
        (layer.gate.kernel, layer.experts.gate_up, layer.experts.down), weights
    ):
        variable.assign(value)
    work = work_of(layer, layer.variables, rows[None])

    def error():
        reference = oracles.sparse_moe(rows, *weights, chosen, True)[0]
        return relative_error(work.run()[0], reference)

    return work._replace(error=error if work_of is forward else None)


def moe(**size):
    return _moe(forward, **size)


def moe_grad(**size):
    return _moe(gradient, **size)


def products(config, batch, length, backward=False):
    pairs = list(kernel_products(config, batch, length))
    ends = [output_gradient(*pair) for pair in pairs] if backward else []
    rows, kernels = map(list, zip(*pairs))

    def multiply(*arrays):
        rows, kernels, ends = (arrays[i : i + len(pairs)] for i in (0, len(pairs), 2 * len(pairs)))
        outputs = [x @ kernel for x, kernel in zip(rows, kernels)]
        outputs += [end @ ops.transpose(kernel) for end, kernel in zip(ends, kernels)]
        return outputs + [ops.transpose(x) @ end for x, end in zip(rows, ends)]

    return forward(multiply, [], *rows, *kernels, *ends)


def loss(tokens, width, vocab):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, width)).astype("float32")
    kernel = (rng.standard_normal((width, vocab)) * 0.02).astype("float32")
    labels = rng.integers(0, vocab, tokens)
    work = gradient(linear_cross_entropy, [], hidden, kernel, labels.astype("int32"))

    def error():
        reference = oracles.cross_entropy(hidden.astype("float64") @ kernel, labels)
        value = linear_cross_entropy(*map(ops.convert_to_tensor, (hidden, kernel, labels)))
        return relative_error(value, reference)

    return work._replace(error=error)
