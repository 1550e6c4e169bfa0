from .api import GatedDeltaRuleOutput, gated_delta_rule
from .replay import Replay, gated_delta_rule_with_replay, replay

__all__ = [
    "GatedDeltaRuleOutput",
    "Replay",
    "gated_delta_rule",
    "gated_delta_rule_with_replay",
    "replay",
]
