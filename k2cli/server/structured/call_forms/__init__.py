"""Grammars of the formats in which models write calls."""
