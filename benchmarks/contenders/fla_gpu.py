"""flash-linear-attention: the delta rule in Triton kernels."""

from fla.ops.gated_delta_rule import chunk_gated_delta_rule

from benchmarks import floors
from benchmarks.contenders import torch_work
from benchmarks.contenders.torch_work import sees_gpu

__all__ = ["delta_rule", "sees_gpu"]


def delta_rule(backward=False, **size):
    work_of = torch_work.gradient if backward else torch_work.forward
    notes = torch_work.notes(floors.delta_rule(**size, backward=backward))
    return work_of(_rule, torch_work.delta_rule_tensors(**size), notes=notes)


def _rule(*inputs):
    return chunk_gated_delta_rule(*inputs)[0]
