"""The maths of the hot paths: pure functions on tensors, the same on every backend.

    attention                       causal grouped-query attention without a (T, S) matrix
    causal_conv1d                   short depthwise convolution over the real tokens of a row
    cross_entropy                   loss of every row from its logits
    linear_cross_entropy            the same from hidden states, never with the logits of all rows
    expert_mlp                      routed experts: every token through the experts it was sent to
    gated_delta_rule                linear attention with a decaying state and the delta rule
    gated_delta_rule_with_replay    the same for a few tokens of which only some may stay
    replay                          the state after those that stay
    linear_kl_divergence            what a student's distribution of every row lacks of a teacher's
    linear_top_kl_divergence        the same from the teacher's largest log-probabilities
    linear_top_log_probs            these, from hidden states and the head's kernel
    grouped_matmul                  every row times the matrix of its group

One folder per op: `api.py` has the public functions, checks and the choice of implementation, the
other modules the maths. Beside them stand what several ops share (`activations`, `checks`,
`padding`, `row_product`, `rows`, `sequence`, `tensor_types`) and `backend/`, what differs between
backends.
"""

from .attention import attention
from .causal_conv1d import causal_conv1d
from .cross_entropy import cross_entropy, linear_cross_entropy
from .distillation import linear_kl_divergence, linear_top_kl_divergence, linear_top_log_probs
from .expert_mlp import expert_mlp
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_with_replay, replay
from .grouped_matmul import grouped_matmul

__all__ = [
    "attention",
    "causal_conv1d",
    "cross_entropy",
    "expert_mlp",
    "gated_delta_rule",
    "gated_delta_rule_with_replay",
    "grouped_matmul",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_top_kl_divergence",
    "linear_top_log_probs",
    "replay",
]
