"""Weights to the nodes that need them: which files, over which link, from whom to whom."""
