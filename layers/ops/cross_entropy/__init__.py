"""Cross-entropy over large vocabularies, without the logits of all rows at once.

cross_entropy            loss of every row from its logits
linear_cross_entropy     the same from hidden states and the head's kernel, chunk by chunk
correct                  where the largest logit is the label's
IGNORE                   the label that has no loss
"""

from .api import IGNORE, correct, cross_entropy, linear_cross_entropy

__all__ = ["IGNORE", "correct", "cross_entropy", "linear_cross_entropy"]
