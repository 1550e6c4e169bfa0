"""transformers' Qwen3-Next on torch, without the GPU kernels it would use elsewhere."""

import numpy as np

from benchmarks.contenders import (
    Work,
    delta_rule_inputs,
    kernel_products,
    moe_inputs,
    output_gradient,
    relative_error,
    token_ids,
)


def build(config):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    names = {"num_layers": "num_hidden_layers"}
    fields = {names.get(key, key): value for key, value in config.items()}
    rope = {
        "rope_type": "default",
        "rope_theta": fields.pop("rope_theta"),
        "partial_rotary_factor": fields.pop("partial_rotary_factor"),
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**fields, rope_parameters=rope, pad_token_id=0))


def prefill(config, batch, length):
    import torch

    model = build(config).eval()
    ids = torch.from_numpy(token_ids(config, batch, length)).long()

    def run():
        with torch.inference_mode():
            model(ids, use_cache=False)

    return Work(run)


def train(config, batch, length, gradient_checkpointing=False):
    import torch

    model = build(config).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.from_numpy(token_ids(config, batch, length)).long()

    def run():
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False, output_router_logits=True).loss.backward()
        optimizer.step()

    return Work(run)


def decode(config, batch, length, new):
    import torch

    model = build(config).eval()
    ids = torch.from_numpy(token_ids(config, batch, length)).long()
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def run():
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return Work(run, units=batch * new)


def read_prompts(config, lengths):
    import torch

    model, longest = build(config).eval(), max(lengths)
    ids = torch.from_numpy(token_ids(config, len(lengths), longest)).long()
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]

    def run():
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=1)

    return Work(run)


def _rule(*inputs):
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next.torch_chunk_gated_delta_rule(*inputs)[0]


def delta_rule(length, heads, dim):
    inputs = delta_rule_inputs(length, heads, dim)
    work = _forward(_rule, inputs)

    def error():
        from tests.support import oracles

        return relative_error(work.run(), oracles.gated_delta_rule(*inputs)[0])

    return work._replace(error=error)


def delta_rule_grad(length, heads, dim):
    return _gradient(_rule, delta_rule_inputs(length, heads, dim))


def _block(tokens, width, experts, chosen, inner):
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next

    config = Qwen3NextConfig(
        hidden_size=width,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=1,
    )
    config._experts_implementation = "grouped_mm"  # what it picks for a whole model
    block = modeling_qwen3_next.Qwen3NextSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.04)
    return block, [moe_inputs(tokens, width, experts, chosen, inner)[0][None]]


def moe(**size):
    return _forward(*_block(**size))


def moe_grad(**size):
    return _gradient(*_block(**size))


def loss(tokens, width, vocab):
    import torch

    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, width)).astype("float32")
    kernel = (rng.standard_normal((width, vocab)) * 0.02).astype("float32")
    labels = torch.from_numpy(rng.integers(0, vocab, tokens))

    def losses(hidden, kernel):
        return torch.nn.functional.cross_entropy(hidden @ kernel, labels)

    return _gradient(losses, [hidden, kernel])


def products(config, batch, length, backward=False):
    """Of torch alone."""
    import torch

    pairs = [tuple(map(torch.from_numpy, p)) for p in kernel_products(config, batch, length)]
    ends = [torch.from_numpy(output_gradient(*pair)) for pair in pairs] if backward else []

    def run():
        outputs = [x @ kernel for x, kernel in pairs]
        for (x, kernel), end in zip(pairs, ends):
            outputs += [end @ kernel.T, x.T @ end]

    return Work(run)


def _forward(function, inputs):
    import torch

    tensors = [torch.from_numpy(x) for x in inputs]

    def run():
        with torch.inference_mode():
            return function(*tensors)

    return Work(run)


def _gradient(function, inputs):
    import torch

    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]

    def run():
        for tensor in tensors:
            tensor.grad = None
        function(*tensors).sum().backward()

    return Work(run)
