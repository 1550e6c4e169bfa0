"""transformers' Qwen3-Next in bfloat16; `transformers-fla` has the kernels of fla for its DeltaNet.

Without them it would look for fla by itself: the worker hides it.
"""

import torch

from benchmarks import floors
from benchmarks.contenders import token_ids, torch_work
from benchmarks.contenders import transformers as whole
from benchmarks.contenders.torch_work import sees_gpu

__all__ = ["attention", "decode", "delta_rule", "gradients", "moe", "prefill", "sees_gpu"]

DTYPE = "bfloat16"


def delta_rule(backward=False, **size):
    repeats = size["heads"] // size["key_heads"]

    def rule(query, key, *others):
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
        return whole.chunked_rule(query, key, *others)

    notes = torch_work.notes(floors.delta_rule(**size, backward=backward))
    return _work_of(backward)(rule, torch_work.delta_rule_tensors(**size), notes=notes)


def moe(backward=False, **size):
    block = whole.make_block(**{k: v for k, v in size.items() if k != "tokens"}, dtype=DTYPE)
    with torch_work.on_device(DTYPE):
        rows = torch.randn(1, size["tokens"], size["width"])
    weights = {"weights": list(block.parameters())} if backward else {}
    notes = torch_work.notes(floors.moe(**size, backward=backward))
    return _work_of(backward)(block, [rows], **weights, notes=notes)


def attention(length, heads, groups, dim, backward=False):
    """Of torch alone, which transformers asks."""
    with torch_work.on_device(DTYPE):
        inputs = [torch.randn(1, n, length, dim) for n in (heads, groups, groups)]

    def attend(*inputs):
        function = torch.nn.functional.scaled_dot_product_attention
        return function(*inputs, is_causal=True, enable_gqa=True)

    notes = torch_work.notes(floors.attention(length, heads, groups, dim, backward))
    return _work_of(backward)(attend, inputs, notes=notes)


def prefill(config, batch, length):
    work = whole.prefill(config, batch, length, DTYPE)
    return work._replace(notes=torch_work.notes(floors.model(config, batch, length)))


def gradients(config, batch, length):
    """Of all weights."""
    model = whole.build(config, DTYPE).train()
    ids = torch_work.to_device(token_ids(config, batch, length)).long()
    return torch_work.gradient(
        lambda ids: model(ids, use_cache=False).logits,
        [ids],
        list(model.parameters()),
        notes=torch_work.notes(floors.model(config, batch, length, backward=True)),
    )


def decode(config, batch, length, new):
    work = whole.decode(config, batch, length, new, DTYPE)
    return work._replace(notes=torch_work.notes(floors.decode(config, batch, length, new)))


def _work_of(backward):
    return torch_work.gradient if backward else torch_work.forward
