"""llama.cpp on the CPU, through the C functions that its Python bindings pass on.

Weights, cache and states are float32, and a pass gives all logits where those of the others do.
"""

import ctypes
import os

import numpy as np

from benchmarks.contenders import Work, token_ids
from benchmarks.gguf_checkpoint import checkpoint

try:
    import llama_cpp as api
except ImportError as error:
    raise ImportError(
        "llama.cpp is not installed: run `make bench LLAMA=1` or `pip install -e '.[llama]'`"
    ) from error


ERROR = 4  # of `ggml_log_level`; the bindings have no names for these


def build(config, length):
    """A model and a context for `length` tokens, given to it at once if need be."""
    api.llama_backend_init()
    api.llama_log_set(_errors, ctypes.c_void_p(0))
    options = api.llama_model_default_params()
    options.n_gpu_layers = 0
    # A mapped file would be read from the disk during the first run.
    options.use_mmap = False
    model = api.llama_model_load_from_file(str(checkpoint(config)).encode(), options)
    if model is None:
        raise RuntimeError("llama.cpp does not load the model")
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = length
    options.n_threads = options.n_threads_batch = os.cpu_count()
    options.type_k = options.type_v = api.GGML_TYPE_F32
    context = api.llama_init_from_model(model, options)
    if context is None:
        raise RuntimeError("llama.cpp makes no context for the model")
    return model, context


def prefill(config, batch, length):
    _, context = build(config, length)
    prompt = _batch(_prompt(config, batch, length), every=True)

    def run():
        _forget(context)
        _decode(context, prompt)
        return _logits(api.llama_get_logits(context), length, config)

    return Work(run)


def decode(config, batch, length, new):
    _, context = build(config, length + new)
    prompt, step = _batch(_prompt(config, batch, length)), _batch([0])

    def run():
        _forget(context)
        _decode(context, prompt)
        found = [_best(context, config)]
        for position in range(length, length + new - 1):
            step.token[0], step.pos[0] = found[-1], position
            _decode(context, step)
            found.append(_best(context, config))
        return found

    return Work(run, units=batch * new)


@api.llama_log_callback
def _errors(level, text, _):
    if level == ERROR:
        os.write(2, text)


def _prompt(config, batch, length):
    if batch != 1:
        raise ValueError(f"llama.cpp is measured on one sequence. Received: batch={batch}")
    return token_ids(config, batch, length)[0].tolist()


def _batch(tokens, every=False):
    """The tokens of a sequence from its start; logits of every one of them, or of the last."""
    found = api.llama_batch_init(len(tokens), 0, 1)
    found.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        found.token[i], found.pos[i], found.n_seq_id[i], found.seq_id[i][0] = token, i, 1, 0
        found.logits[i] = every or i == len(tokens) - 1
    return found


def _forget(context):
    api.llama_memory_clear(api.llama_get_memory(context), False)


def _decode(context, batch):
    status = api.llama_decode(context, batch)
    if status:
        raise RuntimeError(f"llama_decode returns {status}")


def _best(context, config):
    return int(_logits(api.llama_get_logits_ith(context, -1), 1, config).argmax())


def _logits(pointer, tokens, config):
    """What is there after the wait for the computation, `(tokens, vocab_size)`, not a copy."""
    return np.ctypeslib.as_array(pointer, (tokens, config["vocab_size"]))
