"""transformers' Qwen3-Next on torch, on the GPU where there is one."""

import numpy as np
import torch

from benchmarks.contenders import (
    delta_rule_inputs,
    kernel_products,
    moe_inputs,
    output_gradient,
    relative_error,
    token_ids,
)
from benchmarks.contenders.torch_work import forward, on_device, to_device, work


def build(config, dtype=None):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    names = {"num_layers": "num_hidden_layers"}
    fields = {names.get(key, key): value for key, value in config.items()}
    rope = {
        "rope_type": "default",
        "rope_theta": fields.pop("rope_theta"),
        "partial_rotary_factor": fields.pop("partial_rotary_factor"),
    }
    with on_device(dtype):
        return Qwen3NextForCausalLM(Qwen3NextConfig(**fields, rope_parameters=rope, pad_token_id=0))


def prefill(config, batch, length, dtype=None):
    model = build(config, dtype).eval()
    ids = to_device(token_ids(config, batch, length)).long()

    def launch():
        with torch.inference_mode():
            model(ids, use_cache=False)

    return work(launch)


def train(config, batch, length, gradient_checkpointing=False):
    model = build(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = to_device(token_ids(config, batch, length)).long()

    def launch():
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False, output_router_logits=True).loss.backward()
        optimizer.step()

    return work(launch)


def decode(config, batch, length, new, dtype=None):
    model = build(config, dtype).eval()
    ids = to_device(token_ids(config, batch, length)).long()
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def launch():
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return work(launch, units=batch * new)


def read_prompts(config, lengths):
    model, longest = build(config).eval(), max(lengths)
    ids = to_device(token_ids(config, len(lengths), longest)).long()
    mask = to_device(np.arange(longest) >= longest - np.array(lengths)[:, None])

    def launch():
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=1)

    return work(launch)


def chunked_rule(*inputs):
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next.torch_chunk_gated_delta_rule(*inputs)[0]


def delta_rule(length, heads, dim):
    inputs = delta_rule_inputs(length, heads, dim)
    measured = _forward(chunked_rule, inputs)

    def error():
        from tests.support import oracles

        return relative_error(measured.run().cpu(), oracles.gated_delta_rule(*inputs)[0])

    return measured._replace(error=error)


def delta_rule_grad(length, heads, dim):
    return _gradient(chunked_rule, delta_rule_inputs(length, heads, dim))


def make_block(width, experts, chosen, inner, shared=1, dtype=None):
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next

    config = Qwen3NextConfig(
        hidden_size=width,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=shared,
    )
    config._experts_implementation = "grouped_mm"  # what it picks for a whole model
    with on_device(dtype):
        block = modeling_qwen3_next.Qwen3NextSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.04)
    return block


def _block(tokens, **size):
    return make_block(**size), [moe_inputs(tokens, **size)[0][None]]


def moe(**size):
    return _forward(*_block(**size))


def moe_grad(**size):
    return _gradient(*_block(**size))


def loss(tokens, width, vocab):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, width)).astype("float32")
    kernel = (rng.standard_normal((width, vocab)) * 0.02).astype("float32")
    labels = to_device(rng.integers(0, vocab, tokens))

    def losses(hidden, kernel):
        return torch.nn.functional.cross_entropy(hidden @ kernel, labels)

    return _gradient(losses, [hidden, kernel])


def products(config, batch, length, backward=False):
    """Of torch alone."""
    pairs = [tuple(map(to_device, p)) for p in kernel_products(config, batch, length)]
    ends = [to_device(output_gradient(*pair)) for pair in pairs] if backward else []

    def launch():
        outputs = [x @ kernel for x, kernel in pairs]
        for (x, kernel), end in zip(pairs, ends):
            outputs += [end @ kernel.T, x.T @ end]

    return work(launch)


def _forward(function, inputs):
    return forward(function, [to_device(x) for x in inputs])


def _gradient(function, inputs):
    tensors = [to_device(x).requires_grad_() for x in inputs]

    def launch():
        for tensor in tensors:
            tensor.grad = None
        function(*tensors).sum().backward()

    return work(launch)
