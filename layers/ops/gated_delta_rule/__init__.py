"""The gated delta rule: linear attention whose state decays and is corrected towards new values.

gated_delta_rule                outputs of T tokens and the state after them
gated_delta_rule_with_replay    the same for a few tokens of which only some may stay
empty_replay                    a record that writes nothing
replay                          the state after those that stay
GatedDeltaRuleOutput, Replay    what these return
"""

from .api import GatedDeltaRuleOutput, gated_delta_rule
from .replay import Replay, empty_replay, gated_delta_rule_with_replay, replay

__all__ = [
    "GatedDeltaRuleOutput",
    "Replay",
    "empty_replay",
    "gated_delta_rule",
    "gated_delta_rule_with_replay",
    "replay",
]
