"""Divergence of a student's next-token distribution from a teacher's, without all logits at once.

linear_kl_divergence         from the hidden states and the head's kernel of both, chunk by chunk
linear_top_kl_divergence     from the teacher's largest log-probabilities
linear_top_log_probs         these, chunk by chunk
"""

from .api import linear_kl_divergence, linear_top_kl_divergence, linear_top_log_probs

__all__ = ["linear_kl_divergence", "linear_top_kl_divergence", "linear_top_log_probs"]
