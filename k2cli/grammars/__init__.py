"""Grammars that answers obey: their text, their limits, and the process that computes masks."""
