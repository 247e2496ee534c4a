"""Structured output: grammars that a client's schemas and tools become."""
