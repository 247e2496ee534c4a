"""k2's planner beside those that can be installed with pip, on the same checkpoint."""
