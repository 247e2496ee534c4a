"""Parsing of a model's text into reasoning, answer and tool calls."""
