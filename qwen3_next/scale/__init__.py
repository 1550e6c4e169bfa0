"""Models on several devices: which weight lives where, and what that costs."""
