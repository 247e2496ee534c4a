"""Editing of configuration files in JSON, JSON with comments, TOML and YAML."""
