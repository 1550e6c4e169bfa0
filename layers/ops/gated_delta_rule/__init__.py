from .api import GatedDeltaRuleOutput, gated_delta_rule

__all__ = ["GatedDeltaRuleOutput", "gated_delta_rule"]
