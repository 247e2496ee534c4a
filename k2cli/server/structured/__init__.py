"""Structured output: checks of schemas, and the grammar that an answer must obey."""
