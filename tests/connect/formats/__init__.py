"""Edits of configuration files."""
